"""Checkpoints: bit-equal or passed over by name, whatever was done to them, with real kills and a really full disk."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from forks import python
from safetensors.torch import save_file

from dimo.errors import DimoError
from dimo.run import checkpoints as module
from dimo.run.checkpoints import Checkpoints, HostCopies

FILES = ["student.safetensors", "state.pt", "rank-00000.pt"]


def save(folder, step, keep_last=2):
    checkpoints = Checkpoints(folder, keep_last)
    tensors = {"student": {"w": torch.full((300,), float(step))}, "aux": {"w": torch.zeros(2)}}
    checkpoints.save(step, tensors, {"step": step}, {"x_hat": torch.arange(step)})
    return checkpoints.finish()


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_what_is_loaded_is_what_was_given_and_only_the_last_are_kept(tmp_path):
    given = {"student": {"w": torch.randn(3, 4), "v": torch.randn(5).bfloat16()}, "aux": {"w": torch.randn(2).t()}}
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 10):
        checkpoints.save(step, given, {"step": step, "moments": [torch.ones(2)]}, {"x_hat": None})
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000010"]
    folder, damaged = checkpoints.newest()
    tensors, state, rank_state = checkpoints.load(folder)
    assert damaged == {} and state["step"] == 10 and rank_state == {"x_hat": None}
    assert all(
        torch.equal(tensors[n][k], v) and tensors[n][k].dtype == v.dtype for n in given for k, v in given[n].items()
    )


def test_a_copy_beside_a_checkpoint_is_nobodys_to_take_or_remove(tmp_path):
    shutil.copytree(save(tmp_path, 360, keep_last=1), tmp_path / "step-360-copy")
    assert save(tmp_path, 400, keep_last=1) == tmp_path / "step-00000400"
    assert names(tmp_path) == ["step-00000400", "step-360-copy"]
    assert Checkpoints(tmp_path).newest() == (tmp_path / "step-00000400", {})


def test_steps_taken_while_it_is_written_are_not_in_it(tmp_path, monkeypatch):
    """The thread is held back until the weights have changed."""
    checkpoints, weight, moment = Checkpoints(tmp_path), torch.ones(4), torch.ones(4)
    changed, inner = threading.Event(), module.save_file
    monkeypatch.setattr(module, "save_file", lambda *a: (changed.wait(10), inner(*a)))
    checkpoints.save(1, {"student": {"w": weight}}, {"moment": moment}, {"x_hat": moment})
    assert not checkpoints.written() and not (tmp_path / "step-00000001").exists()
    weight.add_(1)
    moment.add_(1)
    changed.set()
    tensors, state, rank_state = checkpoints.load(checkpoints.finish())
    assert tensors["student"]["w"].tolist() == state["moment"].tolist() == rank_state["x_hat"].tolist() == [1.0] * 4


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": (flip, "has another checksum"),
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:100]), "has 100 bytes, not "),
    "emptied": (lambda f: f.write_bytes(b""), "has 0 bytes, not "),
    "gone": (lambda f: f.unlink(), "is missing"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, file, damage):
    older, newer = save(tmp_path, 4), save(tmp_path, 8)
    how, said = DAMAGE[damage]
    how(newer / file)
    folder, damaged = Checkpoints(tmp_path).newest()
    assert folder == older and list(damaged) == [newer] and f"{file} {said}" in damaged[newer]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"state.pt": 3}', '{"state.pt": {"bytes": 1}}', "\x00"])
def test_a_damaged_manifest_is_damage(tmp_path, text):
    older, newer = save(tmp_path, 4), save(tmp_path, 8)
    manifest = newer / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    folder, damaged = Checkpoints(tmp_path).newest()
    assert folder == older and damaged[newer].startswith("manifest.json ")


def test_the_manifest_names_every_file(tmp_path):
    folder = save(tmp_path, 4)
    assert sorted([*json.loads((folder / "manifest.json").read_text()), "manifest.json"]) == names(folder)


def test_where_none_is_whole_nothing_starts_over_by_itself(tmp_path):
    assert Checkpoints(tmp_path / "new").newest() == (None, {})
    flip(save(tmp_path, 4) / "state.pt")
    with pytest.raises(DimoError, match="no checkpoint in .* is intact .step-00000004: state.pt has another checksum"):
        Checkpoints(tmp_path).newest()


def test_the_only_whole_one_is_never_removed(tmp_path):
    good = save(tmp_path, 4, keep_last=1)
    for step in (8, 12):
        shutil.copytree(good, tmp_path / f"step-{step:08d}")
        (tmp_path / f"step-{step:08d}" / "state.pt").write_bytes(b"torn")
    of_the_right_size = bytes((good / "state.pt").stat().st_size)
    (tmp_path / "step-00000012" / "state.pt").write_bytes(of_the_right_size)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    folder, damaged = checkpoints.newest()
    assert folder == good and len(damaged) == 2
    checkpoints.save(9, {"student": {"w": torch.zeros(1)}}, {"step": 9}, {})
    assert checkpoints.finish().name == "step-00000009"
    assert (good / "state.pt").exists()  # with keep_last=2 the two newest whole ones are 4 and 9
    checkpoints.save(12, {"student": {"w": torch.zeros(1)}}, {"step": 12}, {})
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000009", "step-00000012"] and Checkpoints(tmp_path).newest()[1] == {}


def test_a_hostile_pickle_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = save(tmp_path / "c", 7)
    torch.save({"step": Hostile()}, folder / "state.pt")
    with pytest.raises(DimoError, match="step-00000007 cannot be loaded"):
        Checkpoints(tmp_path / "c").load(folder)
    assert not (tmp_path / "executed").exists()


def test_more_ranks_than_wrote_it_share_the_old_states(tmp_path):
    folder = save(tmp_path, 3)
    shutil.copy(folder / "rank-00000.pt", folder / "rank-00001.pt")
    torch.save({"x_hat": torch.ones(1)}, folder / "rank-00001.pt")
    loaded = [Checkpoints(tmp_path, rank=rank).load(folder)[2]["x_hat"].tolist() for rank in range(4)]
    assert loaded == [[0, 1, 2], [1.0], [0, 1, 2], [1.0]]


IN_A_PROCESS = """
import os, signal, sys, torch
from dimo.errors import DimoError
from dimo.run import checkpoints as module
from dimo.run.checkpoints import Checkpoints

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

{before}
checkpoints = Checkpoints(sys.argv[1])
try:
    checkpoints.save(8, {{"student": {{"w": torch.zeros(500_000)}}}}, {{"step": 8}}, {{}})
    checkpoints.finish()
except DimoError as error:
    print(error)
    sys.exit(7)
"""

# a function of the writer, and what runs in its place: the process dies before or after it
MOMENTS = {
    "before the first file": "module.save_file = die",
    "between two files": "inner = module.save_file; module.save_file = lambda *a: (inner(*a), die())",
    "half a file": "module.save_file = lambda _, file: (file.write_bytes(b'half'), die())",
    "before the manifest": "module.Checkpoints._complete = die",
    "before the folder has its name": "module.replace_folder = die",
    "just after": "inner = module.replace_folder; module.replace_folder = lambda *a: (inner(*a), die())",
}


def test_a_checkpoint_that_made_room_comes_back_and_one_that_was_being_removed_does_not(tmp_path):
    save(tmp_path, 4)
    os.rename(save(tmp_path, 8), tmp_path / ".step-00000008.old.partial")
    os.rename(tmp_path / "step-00000004", tmp_path / ".step-00000004.removed.partial")
    Checkpoints(tmp_path).remove_partials()
    assert names(tmp_path) == ["step-00000008"] and Checkpoints(tmp_path).newest()[0].name == "step-00000008"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_of_checkpoints_that_is_not_there_is_no_reason_to_begin_at_step_0(tmp_path, kind):
    where = tmp_path / "checkpoints"
    where.symlink_to(tmp_path / "unmounted") if kind == "link" else where.touch()
    sentence = (
        f"{where} is a link to {tmp_path}/unmounted, which does not exist" if kind == "link" else f"{where} is a file"
    )
    with pytest.raises(DimoError, match=sentence):
        Checkpoints(where).remove_partials()
    with pytest.raises(DimoError, match=f"checkpoint of step 3 could not be written to {where}: {sentence}"):
        save(where, 3)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_is_written_it_is_absent_or_whole(tmp_path, moment):
    older = save(tmp_path, 4)
    code = IN_A_PROCESS.format(before=MOMENTS[moment])
    done = python.run(["-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    checkpoints = Checkpoints(tmp_path)
    expected = tmp_path / "step-00000008" if moment == "just after" else older
    assert checkpoints.newest() == (expected, {})
    checkpoints.remove_partials()
    assert names(tmp_path) == ["step-00000004", "step-00000008"][: 2 if moment == "just after" else 1]
    assert save(tmp_path, 8).name == "step-00000008" and Checkpoints(tmp_path).newest()[1] == {}


def test_a_full_disk_stops_with_a_sentence_and_keeps_the_older_checkpoint(tmp_path):
    """A process whose files may not grow past 1 MB: the kernel refuses the write, as a full disk does."""
    older = save(tmp_path, 4)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    code = limit + IN_A_PROCESS.format(before="")
    done = python.run(["-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "checkpoint of step 8 could not be written to " in done.stdout
    assert "step-00000004 is kept, and the same command continues from it" in done.stdout
    assert names(tmp_path) == ["step-00000004"] and Checkpoints(tmp_path).newest() == (older, {})


def test_host_copies_are_copies_in_memory_that_is_used_again():
    on_host, live = HostCopies(), {"w": torch.arange(6.0).view(2, 3).T, "n": [torch.tensor(1), 7], "none": None}
    copy = on_host(live)
    live["w"].zero_()
    assert torch.equal(copy["w"], torch.arange(6.0).view(2, 3).T) and copy["w"].is_contiguous()
    assert copy["n"] == [torch.tensor(1), 7] and copy["none"] is None
    memory = copy["w"].data_ptr()
    again = on_host(live)
    assert again["w"].data_ptr() == memory and not again["w"].any()
    longer = on_host(live | {"w": torch.ones(4, dtype=torch.float64)})  # another shape: other memory
    assert longer["w"].dtype == torch.float64 and longer["w"].tolist() == [1] * 4
    assert on_host({"w": torch.ones(4, requires_grad=True)})["w"].requires_grad is False


def test_optimizers_have_files_of_their_own_and_those_that_lie_in_state_pt_are_read_too(tmp_path):
    moments = {name: {"w": {"exp_avg": torch.randn(4)}} for name in ("student", "aux")}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"student": {"w": torch.zeros(4)}}, {"step": 3, "optimizers": moments}, {})
    new = checkpoints.finish()
    assert {"optimizer-student.pt", "optimizer-aux.pt"} <= set(names(new))
    assert "optimizers" not in torch.load(new / "state.pt", weights_only=True)

    old = tmp_path / "step-00000007"  # as dimo wrote it before
    old.mkdir()
    save_file({"w": torch.zeros(4)}, old / "student.safetensors")
    torch.save({"step": 7, "optimizers": moments}, old / "state.pt")
    torch.save({}, old / "rank-00000.pt")
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in old.iterdir()
    }
    (old / "manifest.json").write_text(json.dumps(entries))
    assert checkpoints.newest() == (old, {})
    for folder in (new, old):
        state = checkpoints.load(folder)[1]
        for name in moments:
            assert torch.equal(state["optimizers"][name]["w"]["exp_avg"], moments[name]["w"]["exp_avg"])


LEAVES = """
import sys, torch
from pathlib import Path
from dimo.run.checkpoints import Checkpoints

large = {str(i): torch.zeros(5_000_000) for i in range(10)}
given = ({"student": large}, {}) if sys.argv[2] == "safetensors" else ({}, {"optimizers": {"student": large}})
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, *given, {})
while not list(Path(sys.argv[1], ".step-00000001.partial").iterdir()):
    pass
assert not checkpoints.written()
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_process_that_ends_while_one_is_written_has_its_own_exit_code(tmp_path, kind):
    """As after a second Ctrl-C. A thread that Python ends inside PyTorch's or safetensors' code aborts the process."""
    done = subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path), kind], capture_output=True, text=True)
    assert done.returncode == 3 and not done.stderr, done.stderr
    assert Checkpoints(tmp_path).newest() == (None, {})
