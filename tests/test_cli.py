"""The command as a person meets it: what it prints, its exit codes, never a traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from forks import python

from dimo.commands.cli import COMMANDS, main, parse
from dimo.commands.examples import EXAMPLES
from dimo.config import config_keys
from dimo.errors import reason
from dimo.files import write_text


def run(capsys, *arguments):
    code = main(list(arguments))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", [[], ["train"], ["run"], ["evaluate"], ["ablate"], ["config"], ["world", "train"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "usage: dimo" in text and len(text) > 200


def test_config_lists_keys_and_resolves_presets(capsys):
    code, out, _ = run(capsys, "config")
    assert code == 0 and all(key in out for key in config_keys())
    code, out, _ = run(capsys, "config", "-c", "literal", "optim.lr=7e-4")
    assert code == 0 and "estimator: reinforce" in out and "lr: 0.0007" in out
    code, out, _ = run(capsys, "config", "--presets")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} >= {"shapes", "smoke", "literal"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "-c", "shaps"], "neither a preset nor an existing YAML file; did you mean 'shapes'"),
        (
            ["train", "-c", "smoke", "distill.estimatr=dimo"],
            "unknown key 'distill.estimatr'; did you mean 'distill.estimator'",
        ),
        (["train", "-c", "smoke", "distill.estimator=soft"], "estimator must be one of dimo, reinforce, got 'soft'"),
        (["train", "-c", "smoke", "distill.teacher_ckpt=/nowhere"], "neither a folder nor a built-in world"),
        (["run", "-c", "smoke", "-p", "min_shar=1"], "'min_shar' is neither a parameter of a notebook"),
        (["run", "-c", "smoke", "-p", "min_share"], "a parameter must have the form name=value"),
        (["run", "-c", "smoke", "--only", "06_more"], "there is no notebook '06_more'"),
        (["evaluate", "/nowhere/student.pt"], "weights file /nowhere/student.pt does not exist"),
        (["evaluate", "evaluation.sed=1"], "unknown key 'evaluation.sed'; did you mean 'evaluation.seed'"),
        (["evaluate", "a.pt", "--student_ckpt", "b.pt"], "two students were given, b.pt and a.pt; give one"),
        (["evaluate", "a.pt", "b.pt"], "an override must have the form key=value, got 'b.pt'"),
        (["sample", "--prompt", "x", "--sed", "1"], "dimo sample does not take --sed 1; see dimo sample --help"),
        (["report", "nowhere"], "nowhere; "),
        (["evaluate", "runs/nowhere"], "there is no run in "),
        (["evaluate", "sprite"], "sprite is neither a run nor a world whose student ships; did you mean 'sprites'?"),
        (["sample", "--student_ckpt", "shape", "--prompt", "x"], "student ships; did you mean 'shapes'?"),
        (["sample", "--student_ckpt", "runs/nowhere", "--prompt", "x"], "runs has no runs. Train it with"),
        (["replay", "nowhere.json"], "nowhere.json"),
        (["replay", "."], ". is a folder; give the .json of a slice"),
        (["ablate", "--lrs", "big"], "--lrs must be numbers"),
        (["ablate", "--grid", "p2"], "p2 is neither a grid that ships nor an existing YAML file"),
        (["ablate", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["ablate", "--seeds", "-1"], "--seeds must be at least 1, got -1"),
        (["plan", "--size", "1.7b"], "size must be one of 0.6B, 1.7B, tiny, got '1.7b'; did you mean '1.7B'"),
        (["plan", "--size", "1.7B", "--teacher_ckpt", "shapes"], "so --teacher_ckpt must be left out"),
        (["plan", "--teacher_ckpt", "."], "tokenizer/, vae/, but . has none of these"),
        (["ablate", "--minutes", "0"], "minutes positive, got 1, 1, 0"),
        (["train", "-c", "tiles"], "; `dimo world train tiles -o worlds/tiles` makes one"),
        (["train", "-c", "smoke", "distill.teacher=exact"], "only the worlds tiles and sprites have an exact teacher"),
        (
            ["plan", "-c", "tiles", "distill.teacher=exact"],
            "memory is counted for networks; to plan for the others, use distill.teacher=network",
        ),
        (["world", "train", "shapes", "-o", "x", "--frames", "1"], "at least 2 frames"),
        (["world", "train", "shapes", "-o", f"{__file__}/x"], f"cannot be written: {__file__} is a file, not a folder"),
        (["world", "train", "shapes", "-o", "x", "--lr", "-1"], "lr must be positive and finite, got -1.0"),
        (["world", "train", "shapes", "-o", "x", "--t_shift", "1e-8"], "t_shift must lie in [0.001, 1000], got 1e-08"),
        (["world", "train", "shapes", "-o", "x", "--t_per", "token"], "t_per must be one of sample, frame, mixed, got"),
        (["world", "train", "shapes", "-o", "x", "--t_spread", "11"], "t_spread must lie in [0, 10], got 11.0"),
        (["world", "train", "shapes", "-o", "x", "--muon_lr=-1"], "muon_lr must lie in [0, 1], got -1.0"),
        (["world", "train", "shapes", "-o", "x", "--codes", "16"], "dimo world train shapes does not take --codes 16"),
        (["world", "train", "shapes", "-o", "x", "--heads", "0"], "heads must be at least 1, got 0"),
        (["world", "train", "shapes", "-o", "x", "--device", "gpu"], "device must be cpu or cuda, got 'gpu'"),
        (["world", "train", "shapes", "-o", "x", "--seed", str(2**63)], "seed must lie in [0, 2^63)"),
        (["bench", "-c", "smoke", "-o", "x", "--repeats", "0"], "repeats must be at least 1"),
        (["bench", "-c", "smoke", "-o", "x", "--warmup", "-1"], "warmup not negative, got 5 and -1"),
        (["bench", "-c", "smoke", "-o", "x", "--generate", "0"], "--generate must lie in [1, 1000], got 0"),
        (["bench", "-c", "smoke", "-o", "x", "--generate", "25,1001"], "--generate must lie in [1, 1000], got 1001"),
        (["bench", "-c", "smoke", "-o", "x", "--generate", ","], "--generate must list numbers of passes"),
        (["sample", "--teacher_ckpt", "", "--prompt", "x"], "teacher_ckpt must not be empty"),
        (["sample", "--student_ckpt", "", "--prompt", "x"], "student_ckpt must not be empty"),
        (["sample", "--prompt_file", "", "--prompt", "x"], "prompt_file must not be empty"),
        (["evaluate", ""], "student must not be empty"),
        (["evaluate", "-o", ""], "out must not be empty"),
        (["train", "-c", ""], "config must not be empty"),
        (["train", "-c", "smoke", "--out_dir", ""], "experiment.output_dir must not be empty"),
        (["run", "-c", "smoke", "-p", "typo=1"], "'typo' is neither a parameter of a notebook nor a configuration key"),
        (["run", "-c", "smoke", "-p", "min_share=["], "parameter min_share must be like its default 0.0, got '['"),
        (["train", "-c", "smoke", "--out_dir", __file__], f"{__file__} is a file, but a folder is needed"),
        (["train", "-c", "smoke", "--out_dir", f"{__file__}/run"], f"{__file__} is a file, but a folder is needed"),
        (["run", "-c", "smoke", "-p", "min_share=true"], "min_share must be like its default 0.0, got 'true'"),
        (["run", "-c", "smoke", "-p", "min_share=nan"], "parameter min_share must be like its default 0.0, got 'nan'"),
        (["run", "-c", "smoke", "-p", "teacher_ckpt=["], "teacher_ckpt [ is neither a folder nor"),
        (["train", "-c", "smoke", "experiment.output_dir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_two(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and sentence in err and err.startswith("dimo: ") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_memory_that_is_full_is_a_sentence(capsys, monkeypatch):
    for asks, sentence in (
        (
            lambda _: torch.empty(2**60, dtype=torch.int8),
            "memory is too small: 1,152,921,504,606,846,976 bytes",
        ),
        (lambda _: bytearray(2**60), "this machine's memory is full"),
    ):
        monkeypatch.setitem(COMMANDS, "runs", asks)
        code, _, err = run(capsys, "runs")
        assert code == 2 and sentence in err and err.startswith("dimo: ") and err.count("\n") == 1


def test_a_folder_where_a_file_is_to_be_written_is_a_sentence(tmp_path):
    with pytest.raises(OSError) as refused:
        write_text(tmp_path, "x")
    assert reason(refused.value) == f"{tmp_path} is a folder, but a file is needed"


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in EXAMPLES for words in EXAMPLES[name]])
def test_examples_of_the_help_are_taken(name, words, capsys, tmp_path, monkeypatch):
    from dimo.config import load_config

    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    args = parse(shlex.split(f"{name} {words}"))
    if "overrides" in args and name != "evaluate":
        load_config(args.config, args.overrides)
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    assert f"dimo {name} {words}".strip() in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "run", "plan", "ablate", "bench", "config"])
def test_key_value_is_taken_wherever_it_stands(command):
    args = parse([command, "optim.lr=1e-4", "-c", "smoke", "optim.aux_lr=2e-4", "--p_corrupt", "0.5", "distill.w_kd=1"])
    assert (
        set(args.overrides) == {"optim.lr=1e-4", "optim.aux_lr=2e-4", "distill.p_corrupt=0.5", "distill.w_kd=1"}
        and args.config == "smoke"
    )


def test_evaluate_takes_key_value_with_and_without_a_student(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(
        "dimo.evaluation.evaluate.evaluate_to_folder",
        lambda config, weights, out: (
            asked.append((config.evaluation, str(weights), str(out))) or {"student_1": {"spread": 1.0}}
        ),
    )
    for words, student in (
        (["run", "evaluation.seed=1"], "run"),
        (["evaluation.seed=1"], None),
        (["-o", "x", "evaluation.seed=1"], None),
        (["run", "-o", "x", "evaluation.seed=1"], "run"),
        (["run", "--set", "evaluation.seed=1"], "run"),
    ):
        assert main(["evaluate", *words]) == 0, capsys.readouterr().err
        evaluation, weights, out = asked.pop()
        assert evaluation.seed == 1 and out == ("x" if "x" in words else "runs/evaluation")
        assert weights == student if student else weights.endswith("shapes/student")
    for words, preset in (([], "shapes"), (["sprites"], "sprites")):
        capsys.readouterr()
        assert main(["evaluate", *words]) == 0
        out = capsys.readouterr().out
        assert f" run -c {preset} " in out and ("sample --student_ckpt sprites --prompt" in out) == bool(words)
    asked.clear()
    (tmp_path / "lr=1").mkdir()
    assert main(["evaluate", "lr=1"]) == 0 and asked.pop()[1] == "lr=1"  # a folder may be called so


def test_flags_have_one_spelling_and_the_other_is_read():
    words = ["world", "train", "shapes", "-o", "x"]
    assert parse([*words, "--batch_size", "3"]).batch_size == parse([*words, "--batch-size=3"]).batch_size == 3
    assert parse(["train", "--batch-size", "3"]).overrides == parse(["train", "--batch_size", "3"]).overrides
    assert parse(["plan", "--dry-run"]).dry_run and parse(["plan", "--dry_run"]).dry_run
    kept = "--a-b c-d"
    assert parse(["sample", f"--negative-prompt={kept}", "--prompt", "e-f"]).negative_prompt == kept


@pytest.mark.parametrize(
    ("words", "function", "resumes"),
    [
        (["train", "-c", "smoke"], "dimo.commands.train.train", True),
        (["run", "-c", "smoke"], "dimo.commands.notebooks.run_notebooks", True),
        (["evaluate"], "dimo.evaluation.evaluate.evaluate_to_folder", True),
        (["sample", "--prompt", "x"], "dimo.commands.cli.sample_to_folder", False),
        (["runs"], "dimo.run.overview.list_runs", False),
    ],
)
def test_ctrl_c_promises_to_resume_only_where_that_is_so(words, function, resumes, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    code, _, err = run(capsys, *words)
    assert code == 130 and err.startswith("dimo: interrupted") and ("resumes" in err) == resumes


def test_train_then_evaluate_then_train_again(tmp_path):
    """As processes."""
    small = [
        "-c",
        "smoke",
        f"experiment.output_dir={tmp_path}/run",
        "training.max_train_steps=3",
        "distill.batch_size_per_gpu=2",
    ]
    small += ["evaluation.videos_per_prompt=1", "model.device=cpu"]

    def dimo(*arguments):
        return python.run(["-m", "dimo.commands.cli", *arguments], capture_output=True, text=True)

    words = [sys.executable, "-m", "dimo", "train", *small]  # as typed; the others only import sooner
    first = subprocess.run(words, capture_output=True, text=True)
    assert first.returncode == 0 and "dimo evaluate" in first.stdout, first.stderr
    scored = dimo("evaluate", f"{tmp_path}/run")
    assert scored.returncode == 0 and "student, 1 pass " in scored.stdout, scored.stderr
    assert set(json.loads((tmp_path / "run" / "report.json").read_text())) >= {"student_1", "untrained_1", "teacher_4"}
    other = dimo("train", *small, "optim.lr=1e-4")
    assert other.returncode == 2 and "belongs to a run with another configuration" in other.stderr
    assert "Traceback" not in other.stderr


def test_evaluate_reads_the_run_that_a_student_lies_in(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "eval"
    assert main(["train", "-c", "smoke", "--num_steps", "2", "--batch_size", "2", "--out_dir", str(run)]) == 0
    student = run / "checkpoints/final/student.pt"
    words = ["evaluate", "--student_ckpt", str(student), "--teacher_steps", "2", "--out_dir", str(out)]
    assert main(words) == 0
    rows = json.loads((out / "report.json").read_text())
    assert "teacher_2" in rows and "teacher_4" not in rows  # the flag wins over the run's own 1 and 4
    assert rows["student_1"]["videos"] == 2 * 48  # the run's own videos_per_prompt
    capsys.readouterr()
    # its weights, not those of the student that ships: two steps from the teacher it makes no valid video
    assert rows["student_1"]["validity"] < 0.1


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('importing', flush=True); import time; time.sleep(60)")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "dimo", "runs"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT and process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("sample --prompt x --steps", ["1_0", "0x9", "1e1", "٣"]),
        ("sample --prompt x --guidance_scale", ["1_0", "1,5", "nan", "inf"]),
        ("inspect shapes --height", ["1_0"]),
        ("ablate --jobs", ["1_0"]),
        ("plan --memory", ["8_0", "inf"]),
        ("world train shapes -o x --steps", ["1_000"]),
        ("world train shapes -o x --alpha", ["0_1.5"]),
    ],
)
def test_numbers_of_flags_are_written_as_those_of_keys(words, refused, capsys):
    *words, flag = words.split()
    assert getattr(parse([*words, flag, "010"]), flag[2:]) == 10
    for text in refused:
        with pytest.raises(SystemExit) as end:
            parse([*words, flag, text])
        assert end.value.code == 2 and f"argument {flag}: " in capsys.readouterr().err
