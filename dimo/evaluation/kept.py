"""What a teacher makes in an evaluation is kept beside the runs, for its next student: the most of the work.

Rows of the teacher, and of the untrained student, do not depend on the student. They are kept in a folder that is named
by all that they do depend on, so that whatever changes, they are made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch

import dimo
from dimo.config import Config
from dimo.evaluation.comparison import Comparison
from dimo.evaluation.jobs import ABOUT
from dimo.files import write_text
from dimo.run.origin import run_of
from dimo.run.sources import teacher_files
from dimo.ursa.attention import fa4_version, version_of
from dimo.ursa.weights import weight_files

KEPT = ".teachers"  # folder of such folders, beside the runs
MOST = 16  # of them; those that were used last stay
DAY = 86_400  # seconds; one used within a day may be in use by another evaluation


def kept_beside(weights: str | Path, comparison: Comparison, config: Config) -> Path | None:
    """The folder of what the teacher of a student makes, beside the student's run.

    None if the student is in no run folder, or that folder cannot be written to.
    """
    run = run_of(weights)
    if run is None:
        return None
    with contextlib.suppress(OSError):
        folder = kept_in(run.parent / KEPT, comparison, config)
        return folder if os.access(folder, os.W_OK) else None
    return None


def kept_in(place: Path, comparison: Comparison, config: Config) -> Path:
    """The folder in `place` of what the teacher of a comparison makes, created if needed; the oldest there are deleted.

    Raises:
        OSError: it cannot be written to.
    """
    about = json.dumps(depends_on(comparison, config), sort_keys=True)
    folder = place / hashlib.sha256(about.encode()).hexdigest()[:32]
    if not (folder / ABOUT).exists():
        write_text(folder / ABOUT, about + "\n")
    with contextlib.suppress(OSError):  # another user's
        os.utime(folder / ABOUT)
    _forget_oldest(place)
    return folder


def _forget_oldest(place: Path) -> None:
    """Delete all but the MOST folders that were used last, and those used within a day."""
    used = {}
    for file in place.glob(f"{'[0-9a-f]' * 32}/{ABOUT}"):
        with contextlib.suppress(FileNotFoundError):  # another evaluation has just deleted it
            used[file.parent] = file.stat().st_mtime
    for folder in sorted(used, key=used.__getitem__, reverse=True)[MOST:]:
        if time.time() - used[folder] > DAY:
            shutil.rmtree(folder, ignore_errors=True)


def depends_on(comparison: Comparison, config: Config) -> dict:
    """All that the videos of the teacher depend on, what the judge says of them, and how long they take."""
    c, folder, device = comparison, comparison.ursa.folder, comparison.ursa.path.device
    files = [*teacher_files(str(folder)).values(), *weight_files(folder / "vae"), *(folder / "vae").glob("*.json")]
    seen = {str(file.relative_to(folder)): file.stat() for file in files}
    on_gpu = device.type == "cuda"
    return {
        # a file's inode and ctime change when it is written, copied or moved
        "teacher": {name: [s.st_size, s.st_ino, s.st_ctime_ns] for name, s in sorted(seen.items())},
        "network": [config.distill.teacher, config.model.backend, config.model.attention, fa4_version()],
        "precision": config.training.mixed_precision,
        "device": torch.cuda.get_device_name(device) if on_gpu else [platform.machine(), torch.get_num_threads()],
        "code": [dimo.__version__, own_code(), torch.__version__, version_of("transformers"), version_of("diffusers")],
        "prompts": [c.prompts[:: c.copies], c.choice_ids.tolist(), [ids.shape[1] for ids in c.txt_ids]],
        "videos": [c.copies, c.judged_copies, [len(batch) for batch in c.videos], c.grid],
        "seed": c.seed,
        "guidance": [c.guidance["guidance_scale"], c.guidance["guidance_trunc"], c.guidance["uncond_ids"].tolist()],
    }


@functools.cache
def own_code() -> str:
    """A digest of dimo's own source: a version may be edited."""
    root, digest = Path(dimo.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


own_code()  # now: a notebook's kernel goes on with what it has imported, whatever is edited since
