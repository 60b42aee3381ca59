"""What is written is what is meant: texts as they stand, decimal numbers, no key twice."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dimo.commands.notebooks import _parse_parameters
from dimo.config import load_config, to_flat, to_yaml
from dimo.config.flags import split_flags
from dimo.config.values import read_value
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.launch import engine_settings

# what YAML 1.1 takes for something else, or cannot read
LOOKALIKES = """\
no off On true null ~x 007 0b11 1e3 1_000 0.10 12:30 2026-02-30 =
[ {a *x &x !x %x @x `x #1 it's $HOME ${x} ???""".split()
LOOKALIKES += ["a\x85b", "a\u2028b", "\ufeffa"]
LOOKALIKES += ["bad: blurry", "a #1", "- a", "'a' b", '"a" "b"', "a, b", "[a, b]", "null: null", " x "]


@pytest.mark.parametrize("text", LOOKALIKES)
def test_a_text_stays_as_it_is_written_wherever_it_comes_from(text, tmp_path):
    def prompt(overrides):
        return load_config("smoke", overrides).distill.negative_prompt

    assert prompt([f"distill.negative_prompt={text}"]) == text
    others, overrides = split_flags(["--negative_prompt", text], own=set())
    assert others == [] and prompt(overrides) == text
    assert _parse_parameters([f"negative_prompt={text}"], overrides := [], {}) == {} and prompt(overrides) == text
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("smoke", overrides)))
    assert load_config(tmp_path / "config.yaml").distill.negative_prompt == text


@pytest.mark.parametrize("text", "no On null 007 1e3 1_000 1.10 12:30 2026-02-30 0x10 =".split())
def test_a_text_stays_as_it_is_written_in_a_file(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"experiment:\n  name: {text}  # of the run\ndistill: {{negative_prompt: {text}}}\n")
    config = load_config(file)
    assert (config.experiment.name, config.distill.negative_prompt) == (text, text)
    assert config.experiment.output_dir == f"runs/{text}"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("a \x85 b")  # a line's end, to YAML
@example("\u2028\u2029\ufeff")
def test_any_text_comes_back_from_the_file_that_a_run_writes(tmp_path, text):
    config = load_config("smoke")
    config.distill.negative_prompt = text
    (tmp_path / "config.yaml").write_bytes(to_yaml(config).encode())
    assert load_config(tmp_path / "config.yaml").distill.negative_prompt == text


@pytest.mark.parametrize(
    ("written", "text"), [("'007'", "007"), ('"a: b"', "a: b"), ("'it''s'", "it's"), ("''", ""), ("", "")]
)
def test_quotes_around_all_of_a_text_are_none_of_it(written, text, tmp_path):
    assert load_config("smoke", [f"distill.negative_prompt={written}"]).distill.negative_prompt == text
    (tmp_path / "mine.yaml").write_text(f"distill: {{negative_prompt: {written}}}")
    assert load_config(tmp_path / "mine.yaml").distill.negative_prompt == text


NUMBERS = [
    ("training.max_train_steps", {"010": 10, "+7": 7, " 12 ": 12, "'9'": 9},
     ["0x10", "0o7", "1_000", "1,000", "1:30", "1e3", "5.0", "null", "", "true", "\u0663"]),
    ("optim.lr", {"1e-4": 1e-4, "1E-4": 1e-4, ".5": 0.5, "2.": 2.0, "3": 3.0, "010.5": 10.5},
     ["1,5", "1_0.5", "0x1p3", "1:30", "1e", "none", "", "yes", "-", "1 2"]),
    ("model.compile", {"True": True, "YES": True, "on": True, "1": True, "No": False, "off": False, "0": False},
     ["2", "null", "", "ja"]),
    ("evaluation.videos_per_prompt", {"null": None, "None": None, "~": None, "": None, "03": 3},
     ["0x3", "nil", "[1]"]),
    ("distill.min_clarity", {"none": None, "NULL": None, "1e-1": 0.1}, ["1,5", "off"]),
    ("evaluation.teacher_steps", {"[1, 025]": [1, 25], "['4']": [4]},
     ["[0x1]", "[1.5]", "25", "1,25", "[1", "[[1]]", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), [(k, t, v) for k, read, _ in NUMBERS for t, v in read.items()])
def test_numbers_are_decimal_in_files_and_overrides(key, text, value, tmp_path):
    group, name = key.split(".")
    (tmp_path / "mine.yaml").write_text(f"{group}:\n  {name}: {text}\n")
    source = "distill.prompt_source=a.csv"
    for config in (load_config("smoke", [f"{key}={text}", source]), load_config(tmp_path / "mine.yaml", [source])):
        got = to_flat(config)[key]
        assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, _, refused in NUMBERS for text in refused])
def test_what_is_no_number_is_refused_in_files_and_overrides(key, text, tmp_path):
    with pytest.raises(DimoError, match=f"^{key}[: ]"):
        load_config("smoke", [f"{key}={text}"])
    group, name = key.split(".")
    (tmp_path / "mine.yaml").write_text(f"{group}:\n  {name}: {text}\n")
    with pytest.raises(DimoError, match=rf"^{key}[: ]|mine.yaml is not valid YAML: line \d"):
        load_config(tmp_path / "mine.yaml")


def test_a_key_may_stand_for_another_but_not_for_itself():
    config = load_config("smoke", ["optim.aux_lr=${optim.lr}", "experiment.name=a-${experiment.seed}"])
    assert config.optim.aux_lr == config.optim.lr and config.experiment.output_dir == "runs/a-0"
    with pytest.raises(DimoError, match="refers back to experiment.name itself"):
        load_config("smoke", ["experiment.name=x${experiment.output_dir}"])
    with pytest.raises(DimoError, match="unknown key 'experiment.nam'; did you mean 'experiment.name'"):
        load_config("smoke", ["experiment.output_dir=runs/${experiment.nam}"])


def test_keys_that_are_merged_may_be_set_again(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: &a {lr: 1e-3, beta1: 0.5}\ntraining: {engine: ddp}\n")
    assert load_config(tmp_path / "mine.yaml").optim.beta1 == 0.5
    (tmp_path / "mine.yaml").write_text("optim:\n  <<: {lr: 1e-3, beta1: 0.5}\n  lr: 2e-3\n")
    optim = load_config(tmp_path / "mine.yaml").optim
    assert (optim.lr, optim.beta1) == (2e-3, 0.5)


def test_a_key_twice_is_refused_in_an_engines_file_and_in_a_runs(tmp_path):
    engine = tmp_path / "mine.yaml"
    engine.write_text("num_processes: 2\nfsdp_config:\n  fsdp_version: 2\n  fsdp_version: 1\n")
    with pytest.raises(DimoError, match="mine.yaml, line 4: fsdp_config.fsdp_version is set twice, first in line 3"):
        engine_settings(str(engine))
    for wrong in ("two", "'2'", "1.5", "-1", "true"):
        engine.write_text(f"num_machines: {wrong}\n")
        with pytest.raises(DimoError, match="mine.yaml: num_machines must be a whole number, got"):
            engine_settings(str(engine))
    text = to_yaml(load_config("smoke"))
    run = RunFolder.open(tmp_path / "run", text)
    run.write_status(state="finished")
    (run.path / "config.yaml").write_text(text.replace("  lr: ", "  lr: 3.0\n  lr: "))
    with pytest.raises(DimoError, match=r"config.yaml, line \d+: optim.lr is set twice"):
        RunFolder.open(run.path, text)


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(DimoError, match="distill.negative_prompt must be UTF-8 text"):
        read_value("distill.negative_prompt", "str", "a \ud800 b")


@pytest.mark.parametrize("key", ["experiment.output_dir", "distill.teacher_ckpt", "distill.prompt_source"])
def test_nothing_is_no_path(key, tmp_path):
    group, name = key.split(".")
    for nothing in ("~", "null", "None"):
        (tmp_path / "mine.yaml").write_text(f"{group}:\n  {name}: {nothing}\n")
        with pytest.raises(
            DimoError, match=f"^{key} must be a path, got '{nothing}'; leave the key out .* ./{nothing} for a folder"
        ):
            load_config(tmp_path / "mine.yaml")
    assert to_flat(load_config("smoke", [f"{key}=./null"]))[key] == "./null"


def test_a_motion_score_is_a_number_as_any_other():
    for text, value in (("9", 9.0), ("010", 10.0), ("1e1", 10.0), ("score", "score"), ("none", None)):
        own = [f"distill.motion_prefix={text}", "distill.prompt_source=a.csv"]
        assert load_config("smoke", own).distill.motion_value() == value
    for text in ("1_0", "1,5", "0x9", "inf", "nan", ""):
        with pytest.raises(DimoError, match="motion_prefix must be none, score or a number, got"):
            load_config("smoke", [f"distill.motion_prefix={text}", "distill.prompt_source=a.csv"])
