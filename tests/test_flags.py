"""Flags are other names of configuration keys, and the commands that people type resolve to what they mean."""

import pytest
from forks import python

from dimo.config import config_keys, load_config
from dimo.config.flags import flags, split_flags
from dimo.errors import DimoError


def test_every_flag_names_a_key_and_ambiguous_last_parts_are_no_flags():
    table = flags()
    assert set(table.values()) <= set(config_keys())
    # experiment.seed and evaluation.seed share their last part, and so do the two batch sizes
    assert "seed" not in table and table["batch_size"] == "distill.batch_size_per_gpu"
    assert table["num_steps"] == "training.max_train_steps" and table["lambda_ent"] == "distill.lambda_ent"


def test_flags_become_overrides_and_the_rest_stays():
    words = ["-c", "smoke", "--num_steps", "7", "--lr=5e-4", "optim.decay=wsd", "--out", "x", "--teacher_steps", "25"]
    others, overrides = split_flags(words, own={"--out"})
    assert others == ["-c", "smoke", "optim.decay=wsd", "--out", "x"]
    assert overrides == ["training.max_train_steps=7", "optim.lr=5e-4", "evaluation.teacher_steps=[25]"]


def test_a_list_may_lack_its_brackets_in_a_flag():
    for words in (["--teacher_steps", "2,5"], ["--teacher_steps=[2, 5]"], ["--teacher_steps", " [2,5]"]):
        assert load_config("smoke", split_flags(words, own=set())[1]).evaluation.teacher_steps == [2, 5]
    assert load_config("smoke", split_flags(["--trackers=wandb"], own=set())[1]).experiment.trackers == ["wandb"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_step", "5"], "did you mean '--num_steps'"),
        (["--height"], "--height needs a value; it stands for distill.height"),
        (["--height", "--width", "8"], "--height needs a value"),
        (["--seed", "1"], "unknown flag --seed; write experiment.seed=... or evaluation.seed=..."),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(words, message):
    with pytest.raises(DimoError, match=message):
        split_flags(words, own=set())


def test_the_single_gpu_commands_of_the_readme_resolve(tmp_path):
    (tmp_path / "urs").mkdir()
    line = (
        f"--teacher_ckpt {tmp_path / 'urs'} --prompt_file p.txt --num_frames 49 --height 320 --width 512 "
        "--batch_size 2 --num_steps 50000 --log_every 50 --save_every 500 --lambda_ent 0.01 --t_curriculum_steps 10000 "
        "--mixed_precision bf16 --out_dir outputs/full"
    )
    others, overrides = split_flags(line.split(), own=set())
    c = load_config(None, overrides)
    assert not others and c.distill.prompt_source == "p.txt" and c.experiment.output_dir == "outputs/full"
    assert (c.distill.num_frames, c.distill.height, c.distill.width, c.distill.batch_size_per_gpu) == (49, 320, 512, 2)
    # a checkpoint that is no world brings URSA's defaults: its prompt length, and rates that do not destroy it
    assert c.distill.max_prompt_length == 320 and c.optim.optimizer == "adamw" and c.optim.lr <= 1e-5
    assert load_config("shapes").distill.max_prompt_length == 4


def test_presets_of_ursa_are_the_resolutions_of_the_design():
    for name, size in (("distill_dimo", (17, 256, 256)), ("distill_dimo_full", (49, 320, 512))):
        d = load_config(name).distill
        assert (d.num_frames, d.height, d.width) == size
        assert d.lambda_ent == 0.01 and d.t_curriculum_steps == 10_000 and d.p_corrupt == 0.2 and d.corrupt_ratio == 0.2


def test_python_m_dimo_train_runs_and_refuses(tmp_path):
    def run(*words):
        return python.run(["-m", "dimo.train", *words], capture_output=True, text=True, cwd=tmp_path)

    done = run("config=smoke", "training.max_train_steps=2", "--batch_size", "2", f"experiment.output_dir={tmp_path}/r")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r/checkpoints/final/student.pt").exists()
    bad = run("config=smok")
    assert bad.returncode == 2 and "did you mean 'smoke'" in bad.stderr and "Traceback" not in bad.stderr
