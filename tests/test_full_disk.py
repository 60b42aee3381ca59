"""A disk that is really full: a small tmpfs, filled by the run's own checkpoint, or to the last byte by others."""

import subprocess

import pytest
import torch
from forks import python

from dimo.commands.cli import main
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.files import PARTIALS, save_file, save_torch, whole_file, write_text
from dimo.run.checkpoints import Checkpoints
from dimo.run.folder import RunFolder
from dimo.train.trainer import Trainer
from dimo.worlds import checkpoint_folder

SETTINGS = ["model.device=cpu", "distill.batch_size_per_gpu=2", "experiment.log_every=1", "experiment.save_every=4"]
SETTINGS += ["training.max_train_steps=12", "experiment.sample_every=12", "distill.t_draws=1", "distill.aux_steps=1"]


class Disk:
    """A tmpfs of so many bytes."""

    def __init__(self, path, size):
        self.path = path
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("a tmpfs can be mounted by root only")

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def fill(self):
        """Not a byte is left."""
        with open(self.path / "others", "ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))


@pytest.fixture
def disk(request, tmp_path):
    made = Disk(tmp_path, request.param)
    yield made
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # a failed test may hold a file open


def small(size):
    return pytest.mark.parametrize("disk", [size], indirect=True, ids=["tmpfs"])


NETWORK = sum(f.stat().st_size for f in (checkpoint_folder("shapes") / "transformer").glob("*.safetensors"))


@small(8 * NETWORK)  # a checkpoint holds three networks, and two to four times a network in moments
def test_a_checkpoint_that_fills_the_disk_ends_the_run_and_the_same_command_continues(disk):
    words = ["-m", "dimo.commands.cli", "train", "-c", "smoke", *SETTINGS]
    words.append(f"experiment.output_dir={disk.path}/run")
    done = python.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    sentence = done.stderr.splitlines()[-1].removeprefix("dimo: ")
    assert sentence.startswith(f"checkpoint of step 8 could not be written to {disk.path}/run/checkpoints: ")
    assert sentence.endswith("; step-00000004 is kept, and the same command continues from it")
    assert "No space left on device" in sentence and "enforce" not in sentence
    run = RunFolder(disk.path / "run")
    good = run.path / "checkpoints" / "step-00000004"
    assert run.status()["state"] == "failed" and run.status()["error"] == sentence
    assert list(good.parent.iterdir()) == [good] and Checkpoints(good.parent).newest() == (good, {})
    assert not list(run.path.rglob(PARTIALS))
    disk.resize(40 * NETWORK)
    done = python.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and run.status()["state"] == "finished", done.stderr
    assert [row["step"] for row in run.metrics()] == list(range(1, 13))
    assert run.events()[0]["checkpoint"] == "step-00000004"


@small(16 * 2**20)
def test_without_a_byte_left_the_run_still_says_that_it_failed_and_why(disk):
    trainer = Trainer(load_config("smoke", [*SETTINGS, f"experiment.output_dir={disk.path}/run"]))
    inner = trainer.step
    trainer.step = lambda index: (inner(index), disk.fill() if index == 5 else None)[0]
    with pytest.raises(DimoError, match="could not be written: No space left on device; existing checkpoints are kept"):
        trainer.train(progress=False)
    run = RunFolder(disk.path / "run")
    assert run.status()["state"] == "failed" and "No space left" in run.status()["error"]
    assert "No space left" in run.status()["last_lines"][-1]
    assert Checkpoints(run.path / "checkpoints").newest() == (run.path / "checkpoints" / "step-00000004", {})
    assert not list(run.path.rglob(PARTIALS))


@small(2**20)
def test_the_reason_is_the_systems_and_names_the_file(disk):
    with pytest.raises(OSError, match=r"No space left on device: .*/a\.pt'"), whole_file(disk.path / "a.pt") as beside:
        save_torch({"w": torch.zeros(2**19)}, beside)
    with pytest.raises(OSError, match=r"No space left on device: .*/\.a.*\.safetensors'"):
        with whole_file(disk.path / "a.safetensors") as beside:
            save_file({"w": torch.zeros(2**19)}, beside)
    with pytest.raises(OSError, match=r"No space left on device: .*/a\.txt'"):
        write_text(disk.path / "a.txt", "a" * 2**21)
    assert list(disk.path.iterdir()) == []


@small(2**20)
def test_lines_that_do_not_fit_are_left_out_whole(disk):
    run = RunFolder.open(disk.path / "run", to_yaml(load_config("smoke")))
    appended = {"metrics.jsonl": run.log, "events.jsonl": run.event}
    for write in appended.values():
        write({"step": 0})
    disk.fill()
    for name, write in appended.items():
        with pytest.raises(DimoError, match=f"{name} could not be written: No space left"):
            for step in range(1, 100):  # some fit into the page that is there
                write({"step": step} | {f"metric/{i}": 0.5 for i in range(10)})
        lines = (run.path / name).read_text()
        assert lines.endswith("}\n") and len(lines.splitlines()) == step > 1


@small(2**16)
def test_a_disk_that_is_full_from_the_start_is_a_sentence_and_harms_nothing(disk, capsys):
    words = ["train", "-c", "smoke", *SETTINGS, f"experiment.output_dir={disk.path}/run"]
    disk.fill()
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert errors == f"dimo: {disk.path}/run/.lock could not be written: No space left on device; " + (
        "existing checkpoints are kept\n"
    )
    (disk.path / "others").write_bytes(b"")
    run = RunFolder.open(disk.path / "run", to_yaml(load_config("smoke", words[3:])))
    run.write_status(state="preempted", step=4)
    disk.fill()
    assert main(words) == 2 and "could not be written: No space left on device" in capsys.readouterr().err
    assert run.status()["state"] == "preempted" and not list(run.path.glob(PARTIALS))


@small(6 * 4096)  # not even the notebook has room; later it has, and its page has not
def test_a_notebook_that_cannot_be_written_is_a_sentence_and_not_done(disk, capsys, forked_kernels):
    words = ["run", "-c", "smoke", "--only", "01_inputs", *SETTINGS, f"experiment.output_dir={disk.path}/run"]
    assert main(words) == 2
    sentence = (
        f"notebook 01_inputs could not be written to {disk.path}/run/notebooks: [Errno 28] No space left on device"
    )
    assert capsys.readouterr().err.endswith(f"dimo: {sentence}\n")
    assert RunFolder(disk.path / "run").status()["error"] == sentence
    assert list((disk.path / "run" / "notebooks").iterdir()) == []
    disk.resize(2**18)
    assert main(words) == 2 and "No space left on device" in capsys.readouterr().err
    assert [f.name for f in (disk.path / "run" / "notebooks").iterdir()] == [".01_inputs.partial.ipynb"]
