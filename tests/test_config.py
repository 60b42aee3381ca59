"""The configuration: what it reads, and the sentence for everything that it refuses."""

import pytest

from dimo.errors import DimoError
from dimo.train.config import PRESETS, config_keys, describe, load_config, to_flat, to_yaml


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


def test_every_key_says_what_it_means():
    text = describe()
    for key, field in config_keys().items():
        assert key in text and len(field.metadata["help"]) > 3
    assert set(to_flat(load_config())) == set(config_keys())


@pytest.mark.parametrize(
    ("config", "override", "sentence"),
    [
        ("shape", "", "'?shape'? is neither a preset nor a YAML file; did you mean 'shapes'"),
        (None, "optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        (None, "lr=1", "unknown key 'lr'; did you mean 'optim.lr'"),
        (None, "optim.lr=fast", "optim.lr: .*fast"),
        (None, "training.max_train_steps=1.5", "training.max_train_steps: .*1.5"),
        (None, "optim.lr", "an override reads key=value"),
        (None, "optim.lr=0", "optim.lr must be positive"),
        (None, "optim.lr=nan", "optim.lr must be positive"),
        (None, "distill.p_corrupt=1.2", r"distill.p_corrupt must lie in \[0, 1\]"),
        (None, "experiment.seed=-1", r"experiment.seed must lie in \[0, 2\*\*63\), got -1"),
        (None, f"evaluation.seed={2**63}", r"evaluation.seed must lie in \[0, 2\*\*63\)"),
        (None, "distill.estimator=soft", "distill.estimator must be one of dimo, reinforce"),
        (None, "distill.divergence=reversed", "divergence must be one of"),
        (None, "distill.height=30", "height must be a multiple of 8, got 30; the nearest are 24 or 32"),
        (None, "evaluation.teacher_steps=[]", "evaluation.teacher_steps must list"),
        (None, "experiment.log_every=0", "experiment.log_every must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(config, override, sentence):
    with pytest.raises(DimoError, match=sentence):
        load_config(config, [override] if override else [])


def test_overrides_are_a_list_and_no_text():
    with pytest.raises(DimoError, match="overrides must be a list, .* got 'optim.lr=1e-4'"):
        load_config("smoke", "optim.lr=1e-4")  # what papermill's -p gives


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {learning_rate: 1}", "unknown key 'optim.learning_rate'"),
        ("optim: 3", "optim in .* must be a group of keys"),
        ("- a", "must hold groups of keys"),
        ("a: [", "is not readable YAML"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(text, sentence, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(DimoError, match=sentence):
        load_config(file)
