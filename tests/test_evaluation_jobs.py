"""An evaluation in one process, in several, killed and continued: always the same figures."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from forks import python
from processes import BY_CHILDREN
from safetensors.torch import load_file

from dimo.commands.notebooks import notebook_folder
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.comparison import Job
from dimo.evaluation.evaluate import PARTS, evaluate_to_folder, open_comparison, parts_of
from dimo.evaluation.jobs import FEWEST, Parts, alone_in, announce, run_in_processes, take_share
from dimo.ursa import load_ursa, save_student
from dimo.worlds import SHIPPED_STUDENT, student_of

TINY = notebook_folder().parent / "tests" / "data" / "tiny-ursa"
JOBS = [Job("student_1", 0, 1), Job("student_1", 1, 1), Job("teacher_2", 0, 2)]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A captions file and a student that differs from its teacher."""
    folder = tmp_path_factory.mktemp("student")
    (folder / "captions.txt").write_text("a red ball\na dog that jumps\nrain\n", encoding="utf-8")
    network = load_ursa(TINY).transformer
    with torch.no_grad():
        network.lm_head.weight.mul_(1.5)
    save_student(folder / "student", network)
    return folder


def overrides(student):
    return [
        f"distill.teacher_ckpt={TINY}", f"distill.prompt_source={student / 'captions.txt'}", "model.device=cpu",
        "distill.num_frames=5", "distill.height=8", "distill.width=16", "distill.max_prompt_length=9",
        "evaluation.teacher_steps=[4]", "evaluation.judged_videos=3",  # one of the two of each prompt
        "training.mixed_precision=no",  # many CPUs have no fast bf16
    ]  # fmt: skip


def figures(rows):
    """All but what the clock says."""
    return {name: {k: v for k, v in row.items() if not k.startswith("seconds")} for name, row in rows.items()}


@pytest.fixture(scope="module")
def alone(student, tmp_path_factory):
    """What one process gives: (figures, codes)."""
    out = tmp_path_factory.mktemp("alone")
    rows = evaluate_to_folder(load_config("distill_dimo", overrides(student)), student / "student", out, progress=False)
    assert not (out / PARTS).exists()  # all is in the report
    return figures(rows), load_file(out / "codes.safetensors")


def assert_as_alone(out, rows, alone):
    codes = load_file(out / "codes.safetensors")
    assert figures(rows) == alone[0]
    assert codes.keys() == alone[1].keys() and all(torch.equal(codes[name], alone[1][name]) for name in codes)


def command(student, out, *more):
    """What follows `python -m dimo` to evaluate the student in processes of their own."""
    words = ["evaluate", str(student / "student"), "-c", "distill_dimo", "-o", str(out)]
    return [*words, *overrides(student), *more]


def test_two_processes_give_the_figures_of_one_and_a_third_loads_nothing(student, alone, tmp_path):
    words = ["-c", BY_CHILDREN, *command(student, tmp_path, "training.num_processes=2")]
    done = python.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_as_alone(tmp_path, json.loads((tmp_path / "report.json").read_text()), alone)
    assert "evaluate: 39 videos in 7 rows, 462 passes in 2 processes" in done.stderr
    assert done.stderr.count("462/462 passes  done") == 1


def test_a_killed_evaluation_goes_on(student, alone, tmp_path):
    process = python.start(["-m", "dimo", *command(student, tmp_path)], stderr=subprocess.PIPE, text=True)
    folder = tmp_path / PARTS
    while len(list(folder.glob("[!.]*.safetensors"))) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("[!.]*.safetensors")}
    (folder / ".student_1-00000.1.partial.safetensors").write_text("half a file")
    assert 5 <= len(kept) < 39 and not (tmp_path / "report.json").exists()

    config, seen, save = load_config("distill_dimo", overrides(student)), [], Parts.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "save", lambda self, *a: (seen.append(self.file(a[0]).name), save(self, *a)))
        rows = evaluate_to_folder(config, student / "student", tmp_path, progress=False)
    assert not set(seen) & kept.keys() and len(seen) == 39 - len(kept)
    assert_as_alone(tmp_path, rows, alone)


def test_of_a_world_too_half_of_the_jobs_by_another_process_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)  # to draw one takes longer
    words = ["model.device=cpu", "evaluation.videos_per_prompt=1", "evaluation.judged_videos=0"]
    config = load_config("smoke", [*words, "evaluation.batch_size=24", "evaluation.teacher_steps=[2]"])
    whole = evaluate_to_folder(config, SHIPPED_STUDENT, tmp_path / "whole", progress=False)
    comparison, _ = open_comparison(config, SHIPPED_STUDENT)
    parts, jobs = parts_of(config, SHIPPED_STUDENT, tmp_path / "shared", comparison.prompts), comparison.jobs()
    take_share(comparison, parts, 1, 2)  # and then it was killed
    assert parts.missing(jobs) == jobs[::2] and len(jobs) == 2 * 6
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):  # of the pictures, but the figures are kept
        evaluate_to_folder(config, SHIPPED_STUDENT, tmp_path / "shared", progress=False)
    rows = json.loads((tmp_path / "shared/report.json").read_text())
    assert figures(rows) == figures(whole) and rows["student_1"]["validity"] > 0.9


def test_what_takes_hours_on_a_cpu_is_told_with_what_is_quicker(capsys):
    """Nothing is sampled: jobs know what they cost."""
    student, costs = student_of("sprites"), []
    for words in ([], shlex.split(FEWEST)):
        comparison, _ = open_comparison(load_config("sprites", ["model.device=cpu", *words]), student)
        jobs = comparison.jobs()
        costs.append(sum(job.cost for job in jobs))
        announce(comparison, jobs, jobs, 1, None)
        assert all(len(batch) == 1 for batch in comparison.videos)  # the bar moves with every video
        err = capsys.readouterr().err
        assert f"{costs[-1]} passes" in err and ("may take hours" in err) == (not words)
    assert costs[1] == 64 * (4 + 2) and costs[0] > 200 * costs[1]  # one pass of each unguided row, two of the teacher
    comparison, _ = open_comparison(load_config("sprites", ["model.device=cpu", "evaluation.batch_size=9"]), student)
    assert len(comparison.videos[0]) == 9


def test_what_another_student_setting_or_version_has_left_is_not_taken_up(student, tmp_path, monkeypatch):
    config = load_config("distill_dimo", overrides(student))
    parts = parts_of(config, student / "student", tmp_path, ["rain"])
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    assert parts_of(config, student / "student", tmp_path, ["rain"]).missing(JOBS) == JOBS[1:]
    (weights,) = (student / "student").glob("*.safetensors")
    os.utime(weights, ns=(1, 1))  # written again
    assert parts_of(config, student / "student", tmp_path, ["rain"]).missing(JOBS) == JOBS
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    other = load_config("distill_dimo", [*overrides(student), "evaluation.seed=2"])
    parts = parts_of(other, student / "student", tmp_path, ["rain"])
    assert parts.missing(JOBS) == JOBS
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    parts = parts_of(other, student / "student", tmp_path, ["snow"])
    assert parts.missing(JOBS) == JOBS  # the captions were edited
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    monkeypatch.setattr("dimo.evaluation.evaluate.own_code", lambda: "what the judge says was defined otherwise")
    assert parts_of(other, student / "student", tmp_path, ["snow"]).missing(JOBS) == JOBS


def test_what_another_teacher_of_the_same_name_has_left_is_not_taken_up(student, tmp_path):
    teacher = shutil.copytree(TINY, tmp_path / "teacher")
    config = load_config("distill_dimo", [*overrides(student), f"distill.teacher_ckpt={teacher}"])
    parts_of(config, student / "student", tmp_path, ["rain"]).save(JOBS[0], {"codes": torch.zeros(1, 4)})
    os.utime(teacher / "scheduler" / "scheduler_model.pth", ns=(1, 1))
    assert parts_of(config, student / "student", tmp_path, ["rain"]).missing(JOBS) == JOBS


def test_a_second_evaluation_into_the_same_folder_is_refused(student, tmp_path):
    config = load_config("distill_dimo", overrides(student))
    holds = "import pathlib, sys; from dimo.evaluation.jobs import alone_in\n"
    holds += "with alone_in(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    words = ["-c", holds, str(tmp_path)]
    with python.start(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DimoError, match=f"another process is writing an evaluation to {tmp_path}; wait"):
            evaluate_to_folder(config, student / "student", tmp_path, progress=False)
        other.kill()
    with alone_in(tmp_path):  # the kernel has let it go
        assert not list(tmp_path.iterdir())


def test_what_the_disk_has_damaged_is_made_again(tmp_path):
    parts = Parts(tmp_path, {"a": 1})
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    parts.file(JOBS[0]).write_bytes(parts.file(JOBS[0]).read_bytes()[:20])
    with pytest.raises(DimoError, match=r"student_1-00000.safetensors was damaged .*; run the same command again"):
        parts.load(JOBS[:1])
    assert parts.missing(JOBS) == JOBS
    with pytest.raises(DimoError, match=r"student_1-00000.safetensors was deleted meanwhile; run the same command"):
        parts.load(JOBS[:1])
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    (tmp_path / "about.json").write_bytes(b"\xff\xfe")
    assert Parts(tmp_path, {"a": 1}).missing(JOBS) == JOBS


def test_all_that_is_damaged_is_made_again_by_one_command(tmp_path, caplog):
    parts = Parts(tmp_path / "out", {"a": 1}, teachers=tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    for job in JOBS:
        parts.save(job, {"codes": torch.zeros(1, 4)})
    whole, *others = JOBS
    for job, size in zip(others, itertools.cycle((0, 4, 20, 90)), strict=False):
        parts.file(job).write_bytes(parts.file(job).read_bytes()[:size])
    parts.forget_damaged(JOBS)
    assert parts.missing(JOBS) == others and len(caplog.records) == len(others) > 1
    assert "is made again" in caplog.text and parts.load([whole])


def test_what_others_keep_where_the_jobs_lie_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "codes.safetensors").write_bytes(b"mine")
    parts = Parts(tmp_path, {"a": 1})
    parts.save(JOBS[0], {"codes": torch.zeros(1, 4)})
    assert Parts(tmp_path, {"a": 2}).missing(JOBS) == JOBS
    parts.remove()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes.safetensors", "notes.txt"]


@pytest.mark.parametrize(
    ("does", "sentence"),
    [
        ("sys.exit('no memory')", "process 1 failed: no memory .*process-1.log.*the same command"),
        ("os.kill(os.getpid(), 9)", "process 1 was killed by signal 9"),
    ],
)
def test_a_process_that_fails_is_told_and_ends_the_others(tmp_path, does, sentence):
    pid = tmp_path / "pid"
    waits = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    fails = f"import os, sys, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.01)\n{does}"
    commands = [[sys.executable, "-c", waits], [sys.executable, "-c", fails]]
    with pytest.raises(DimoError, match=sentence):
        run_in_processes(lambda rank, of: commands[rank], JOBS, Parts(tmp_path, {"a": 1}), 2, progress=False)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert json.loads((tmp_path / "about.json").read_text()) == {"a": 1}


def test_more_processes_than_gpus_share_them(tmp_path, monkeypatch):
    """On a CPU beside a GPU, say: model.device=cpu does not hide it."""
    monkeypatch.setattr("dimo.evaluation.jobs.visible_gpus", lambda: ["3", "5"])
    tells = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"

    def words(rank, of):
        return [sys.executable, "-c", tells, str(tmp_path / f"rank-{rank}")]

    run_in_processes(words, JOBS, Parts(tmp_path, {"a": 1}), 3, progress=False)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)] == ["3", "5", "3"]
