"""The configuration: what it reads, and the sentence for everything that it refuses."""

import re
from pathlib import Path

import pytest

from dimo.config import PRESETS, config_keys, load_config, to_flat, to_yaml
from dimo.config.flags import describe
from dimo.errors import DimoError


@pytest.mark.parametrize("preset", [p.stem for p in PRESETS.glob("*.yaml")])
def test_presets_are_valid_and_survive_a_round_trip(preset, tmp_path):
    config = load_config(preset)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


def test_overrides_come_last_and_keep_their_type():
    config = load_config(
        "smoke", ["optim.lr=3e-4", "evaluation.teacher_steps=[1,9]", "experiment.name=x y", "distill.divergence=0.3"]
    )
    assert config.optim.lr == 3e-4 and config.evaluation.teacher_steps == [1, 9]
    assert config.experiment.output_dir == "runs/x y" and config.distill.divergence == "0.3"
    assert config.training.max_train_steps == 50


def test_no_mixed_precision_can_be_asked_for(tmp_path):
    assert load_config("distill_dimo", ["training.mixed_precision=no"]).training.mixed_precision == "no"
    file = tmp_path / "mine.yaml"
    file.write_text("training: {mixed_precision: no}\nmodel: {compile: yes}")
    config = load_config(file)
    assert config.training.mixed_precision == "no" and config.model.compile is True


def test_every_key_says_what_it_means():
    text = describe()
    for key, field in config_keys().items():
        assert key in text and len(field.metadata["help"]) > 3
    assert set(to_flat(load_config())) == set(config_keys())


def test_a_protocol_replaces_what_a_preset_says_of_guidance_and_nothing_that_is_said_beside_it(tmp_path):
    vbench = "distill.protocol=vbench"

    def of(*words, config="distill_dimo"):
        flat = to_flat(load_config(config, list(words)))
        return tuple(flat[f"distill.{key}"] for key in ("guidance_scale", "negative_prompt", "motion_prefix"))

    upstream = "worst quality, low quality, inconsistent motion, static, still, blurry, jittery, distorted, ugly"
    assert of() == (3.0, "", "none")
    assert of(vbench) == (7.0, upstream, "9")
    assert of("distill.guidance_scale=5", vbench, "distill.negative_prompt=dull") == (5.0, "dull", "9")
    file = tmp_path / "mine.yaml"
    teacher = "teacher_ckpt: elsewhere, prompt_source: captions.txt"
    file.write_text(f"distill: {{{teacher}, protocol: vbench, guidance_scale: 4}}\n", encoding="utf-8")
    assert of(config=file) == (4.0, upstream, "9")
    file.write_text(to_yaml(load_config("distill_dimo", [vbench, "distill.motion_prefix=3"])), encoding="utf-8")
    assert of(config=file) == (7.0, upstream, "3")


@pytest.mark.parametrize(
    ("config", "override", "sentence"),
    [
        ("shape", "", "'?shape'? is neither a preset nor an existing YAML file; did you mean 'shapes'"),
        (None, "optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        (None, "lr=1", "unknown key 'lr'; did you mean 'optim.lr'"),
        (None, "optim.lr=fast", "optim.lr: .*fast"),
        (None, "training.max_train_steps=1.5", "training.max_train_steps: .*1.5"),
        (None, "optim.lr", "an override must have the form key=value"),
        (None, "optim.lr=0", "optim.lr must be positive"),
        (None, "optim.lr=nan", "optim.lr must be a finite number"),
        (None, "optim.lr=[1", "optim.lr: '.1' is not a number"),
        (None, "optim.lr=???", "optim.lr: '...' is not a number"),
        (None, "evaluation.teacher_steps=[1", "evaluation.teacher_steps: '.1' is not valid YAML"),
        (None, "experiment.trackers=tensorbord", r"must be a list, such as .tensorbord., got 'tensorbord'"),
        (None, "experiment.trackers=[tensorbord]", "unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        (None, "evaluation.teacher_steps=25", "evaluation.teacher_steps must be a list, such as .25., got '25'"),
        (None, "experiment.name=..", "experiment.name must name a folder inside runs/"),
        (None, "distill.t_draws=0", "distill.t_draws must be at least 1"),
        (None, "distill.aux_pass=shared", "needs aux_steps >= t_draws, got distill.t_draws=4 and"),
        (None, "distill.w_distill=0", "distill.w_distill and distill.w_kd are both 0"),
        (None, "distill.p_corrupt=1.2", r"distill.p_corrupt must lie in \[0, 1\]"),
        (None, "experiment.seed=-1", r"experiment.seed must lie in \[0, 2\^63\), got -1"),
        (None, f"evaluation.seed={2**63}", r"evaluation.seed must lie in \[0, 2\^63\)"),
        (None, "distill.divergence=reversed", "divergence must be one of"),
        (None, "distill.height=30", "height must be a multiple of 8, got 30; the nearest are 24 or 32"),
        (None, "evaluation.teacher_steps=[]", "evaluation.teacher_steps must list"),
        (None, "evaluation.teacher_steps=[0,4]", r"evaluation.teacher_steps must lie in \[1, 1000\], got 0"),
        (None, "evaluation.teacher_steps=[25,1001]", r"evaluation.teacher_steps must lie in \[1, 1000\], got 1001"),
        (None, "experiment.log_every=0", "experiment.log_every must be at least 1"),
        (None, "distill.protocol=vbensh", "protocol must be none or vbench, got 'vbensh'; did you mean 'vbench'"),
        (None, "distill.protocol=vbench", "needs a URSA checkpoint and a file of captions, but"),
        ("distill_dimo_image", "distill.protocol=vbench", "is how videos are made, with a motion prefix, but"),
        ("distill_dimo", "training.cuda_graph=true training.num_processes=2", "needs training.num_processes=1, got 2"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(config, override, sentence):
    with pytest.raises(DimoError, match=sentence):
        load_config(config, override.split())


@pytest.mark.parametrize("key", [k for k, value in to_flat(load_config()).items() if isinstance(value, float)])
def test_every_float_must_be_finite(key):
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(DimoError, match=f"{key} must be a finite number, got {value}"):
            load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("refused", "allowed"),
    [
        ("optim.weight_decay=-1", "0.1"),
        ("optim.muon_weight_decay=-1", "0"),
        ("optim.warmup_steps=-1", "0"),
        ("optim.beta1=1", "0"),
        ("optim.beta2=1", "0.999"),
        ("optim.muon_momentum=1", "0.95"),
        ("optim.ema_decay=1", "0"),
        ("distill.baseline_decay=1", "0"),
        ("distill.w_distill=-1", "0.5"),
        ("distill.w_kd=-1", "0"),
        ("distill.w_reinforce=-1", "1"),
        ("distill.lambda_ent=-1", "0.01"),
        ("distill.lambda_ent_high=-1", "0"),
        ("distill.entropy_floor=-0.1", "1.5"),
        ("distill.t_curriculum_steps=-1", "10"),
        ("distill.ent_anneal_from=-1", "5"),
        ("experiment.seed=-1", str(2**63 - 1)),
        ("experiment.seed=99999999999999999999", "0"),
        ("evaluation.seed=-9999999999999999999999", "7"),
        *((f"{key}=' '", "x") for key in ("experiment.name", "experiment.output_dir", "training.engine")),
        *((f"{key}=", "x") for key in ("distill.teacher_ckpt", "distill.prompt_source", "experiment.name")),
    ],
)
def test_what_lies_outside_is_refused_and_what_lies_inside_is_not(refused, allowed):
    key = refused.split("=")[0]
    with pytest.raises(DimoError, match=f"^{key} must "):
        load_config("smoke", [refused])
    load_config("smoke", [f"{key}={allowed}"])


def test_what_compares_the_samples_of_a_batch_needs_two():
    for keys in (["distill.w_reinforce=0.1"], ["distill.estimator=reinforce", "distill.baseline=leave_one_out"]):
        load_config("smoke", keys)
        with pytest.raises(DimoError, match="batch_size_per_gpu must be at least 2, got 1"):
            load_config("smoke", [*keys, "distill.batch_size_per_gpu=1"])


def test_the_student_must_have_something_to_learn_from_and_a_fade_an_order():
    load_config(None, ["distill.w_distill=0", "distill.w_kd=1"])
    alone = ["distill.w_distill=0", "distill.w_kd=1", "model.logit_gain=1"]
    with pytest.raises(DimoError, match="starts as that teacher, so the KL is 0 and it would learn nothing: set w_dis"):
        load_config(None, alone)
    for more in ("distill.guidance_scale=3", "distill.teacher=exact", "model.logit_gain=2", "distill.lambda_ent=0.1"):
        load_config("tiles", [*alone, more])
    with pytest.raises(DimoError, match="w_distill also multiplies w_reinforce"):
        load_config(None, ["distill.w_distill=0", "distill.w_reinforce=1"])
    load_config(None, ["distill.ent_anneal_from=5"])
    load_config(None, ["distill.ent_anneal_from=5", "distill.ent_anneal_to=5"])
    with pytest.raises(DimoError, match="ent_anneal_from must not be after ent_anneal_to, got 5 and 4"):
        load_config(None, ["distill.ent_anneal_from=5", "distill.ent_anneal_to=4"])


def test_overrides_are_a_list_and_no_text():
    with pytest.raises(DimoError, match="overrides must be a list, .* got 'optim.lr=1e-4'"):
        load_config("smoke", "optim.lr=1e-4")  # what papermill's -p gives
    with pytest.raises(DimoError, match="overrides must be a list"):
        load_config("smoke", {"optim.lr": 1e-4})
    with pytest.raises(DimoError, match="7 is neither a preset nor an existing YAML file"):
        load_config(7)  # what papermill makes of `-p config 007`
    with pytest.raises(DimoError, match="an override must be a string, got .'distill.negative_prompt=a': 'b'.; quote"):
        load_config("smoke", [{"distill.negative_prompt=a": "b"}])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {learning_rate: 1}", "unknown key 'optim.learning_rate'"),
        ("optim: 3", "optim in .*mine.yaml must be a group of keys, got 3$"),
        ("optm: 3", "must be a group of keys, got 3; did you mean 'optim'"),
        ("- a", "must hold groups of keys, got list"),
        ("", "must hold groups of keys, got nothing"),
        ("optim: {lr: 1}\na: [", r"mine.yaml is not valid YAML: line 2: [^\n]*$"),
        ("optim: {lr: '${'}", "optim.lr: "),
        ("experiment: {trackers: wandb}", "experiment.trackers must be a list"),
        ("optim:\n  aux_lr: 1\n  beta1: 0\n  aux_lr: 2", r"mine.yaml, line 4: optim.aux_lr is .*, first in line 2$"),
        ("optim: {lr: 1, beta1: 0, 'lr': 1}", "mine.yaml, line 1: optim.lr is set twice"),
        ("optim: {lr: 1}\nmodel: {compile: no}\noptim: {beta1: 0}", "line 3: optim is set twice, first in line 1$"),
        ("optim: {lr: 1}\noptim.lr: 2", "optim.lr in .* must be a group of keys, got 2; in a file, write optim: .lr"),
        ("distill: {negative_prompt: [a, b]}", "distill.negative_prompt must be a single value, got a list"),
        ("distill:\n  negative_prompt: dull: grey", "line 2: mapping .*; quote text that contains ': '$"),
        ("optim: {lr: !!python/name:os.system x}", "mine.yaml is not valid YAML"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(text, sentence, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(DimoError, match=sentence):
        load_config(file)


@pytest.mark.parametrize(
    ("size", "batch", "kept"),
    [
        ((17, 256, 256), 1, "none"),
        ((17, 256, 256), 2, "swiglu"),
        ((17, 256, 256), 3, "selective"),
        ((49, 320, 512), 1, "selective"),
        ((49, 320, 512), 2, "full"),
    ],
)
def test_a_folder_without_a_preset_is_trained_with_what_fits(tmp_path, size, batch, kept):
    own = [f"distill.teacher_ckpt={tmp_path}", f"distill.batch_size_per_gpu={batch}"]
    own += [f"distill.{name}={value}" for name, value in zip(("num_frames", "height", "width"), size)]
    assert load_config(None, own).model.activation_checkpointing == kept
    asked = [*own, "model.activation_checkpointing=selective"]
    assert load_config(None, asked).model.activation_checkpointing == "selective"
    assert load_config("distill_dimo", own).model.activation_checkpointing == "none"  # a preset is what it says
    assert load_config().model.activation_checkpointing == "none"
    with pytest.raises(DimoError, match="must be one of none, swiglu, selective, full, got 'pointwise'"):  # as once was
        load_config(None, [*own, "model.activation_checkpointing=pointwise"])


def test_the_recipe_page_has_a_row_for_every_key_that_decides_what_is_learnt():
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = {key: value.strip() for key, value in re.findall(r"^\| `([\w.]+)` \|([^|]*)\|", page, re.M)}
    data = "teacher_ckpt prompt_source min_clarity min_aesthetic min_motion min_suitability shuffle_buffer num_frames"
    data = {f"distill.{key}" for key in f"{data} height width max_prompt_length batch_size_per_gpu".split()}
    config = to_flat(load_config("distill_dimo"))
    wanted = {key for key in config if key.startswith(("distill.", "optim."))} - data
    wanted |= {f"model.{key}" for key in ("train_embeddings", "train_head", "logit_gain", "final_logit_gain")}
    wanted |= {f"training.{key}" for key in ("max_train_steps", "mixed_precision", "gradient_accumulation_steps")}
    assert rows.keys() == wanted
    for key, written in rows.items():
        assert load_config("distill_dimo", [f"{key}={written}"]) == load_config("distill_dimo"), key
