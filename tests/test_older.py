"""A run that an older dimo began is resumed to what it would have become then, and not with today's defaults."""

import yaml

from dimo.commands.cli import main
from dimo.config import config_keys
from dimo.config.changes import FREE_KEYS
from dimo.config.older import BEFORE, NO_MORE, ONE_BEFORE


def train_words(folder, *more):
    words = ["train", "-c", "smoke", "model.device=cpu", "distill.batch_size_per_gpu=2", "experiment.sample_every=99"]
    return [*words, f"experiment.output_dir={folder}", "experiment.log_every=1", *more]


def test_a_run_begun_before_keys_existed_goes_on_as_it_began(tmp_path, capsys):
    """As dimo was before the head stayed the teacher's: no gain, one draw of t, a mix that does not fade."""
    began = ["model.train_head=true", "model.logit_gain=1", "model.final_logit_gain=1", "distill.t_power=1"]
    began += ["distill.t_draws=1", "distill.p_corrupt_fade=0", "optim.aux_min_lr_share=0.3", "optim.min_lr_share=0.3"]
    began += ["optim.muon_weight_decay=0"]
    still = ["optim.min_lr_share=0.3", "optim.decay=constant"]  # old keys; rates that do not depend on the last step
    assert main(train_words(tmp_path / "then", "training.max_train_steps=4", *began, still[1])) == 0
    assert main(train_words(tmp_path / "run", "training.max_train_steps=2", *began, still[1])) == 0
    file = tmp_path / "run" / "config.yaml"
    names = [word.split(".")[1].split("=")[0] for word in began if word not in still]
    lines = [line for line in file.read_text().splitlines() if line.strip().split(":")[0] not in names]
    file.write_text("\n".join([*lines, ""]).replace("distill:\n", "distill:\n  temperature: 1.0\n"))
    capsys.readouterr()
    assert main(train_words(tmp_path / "run", "training.max_train_steps=3", *still)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "predates some keys" in line]
    assert len(said) == 1 and all(word in said[0] for word in ("model.train_head=True", "optim.aux_min_lr_share=0.3"))
    assert said[0].removeprefix("dimo: ") in (tmp_path / "run" / "train.log").read_text()
    # and again, by the same command: they stay unknown to the run
    assert main(train_words(tmp_path / "run", "training.max_train_steps=4", *still)) == 0
    assert set(names).isdisjoint(yaml.safe_load(file.read_text())["model"])
    students = [(tmp_path / name / "checkpoints" / "final" / "student.pt").read_bytes() for name in ("then", "run")]
    assert students[0] == students[1]
    assert main(train_words(tmp_path / "run", "training.max_train_steps=4", *still, "distill.t_draws=3")) == 2
    assert "distill.t_draws was 1, is 3" in capsys.readouterr().err


FIRST = """experiment: name output_dir seed log_every save_every sample_every keep_last resume overwrite
model: device
distill: teacher_ckpt prompt_source num_frames height width max_prompt_length batch_size_per_gpu guidance_scale
distill: guidance_trunc empty_prompt_share estimator divergence aux_objective aux_steps label_smoothing w_distill w_kd
distill: w_reinforce baseline baseline_decay lambda_ent lambda_ent_high entropy_floor ent_anneal_from ent_anneal_to
distill: t_curriculum_steps t_per p_corrupt corrupt_ratio
optim: lr aux_lr warmup_steps decay beta1 beta2 weight_decay max_grad_norm ema_decay
training: max_train_steps mixed_precision
evaluation: videos_per_prompt teacher_steps seed batch_size"""


def test_every_key_that_came_later_has_the_value_of_before():
    first = {f"{line.split(':')[0]}.{key}" for line in FIRST.splitlines() for key in line.split(": ")[1].split()}
    later = config_keys().keys() - first - FREE_KEYS
    assert later == BEFORE.keys() | ONE_BEFORE.keys() and first <= config_keys().keys() | NO_MORE.keys()
