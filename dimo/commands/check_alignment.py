"""`dimo check-alignment`: which misalignment the logits slice of a checkpoint has, or a function of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

from dimo.config import default_prompt_length
from dimo.errors import DimoError, nearest, reason, require_time
from dimo.ursa import load_ursa
from dimo.ursa.device import pick_device, pick_dtype
from dimo.ursa.loading import DTYPES
from dimo.ursa.sampler import require_passes
from dimo.views.alignment import FEWEST, Alignment
from dimo.views.clean_tokens import PASSES, known_clean_tokens, sampled_clean_tokens
from dimo.views.reading import NEAR_DATA, Slice, check_slice, logits_fit
from dimo.worlds import checkpoint_folder, is_world, video_size

RIGHT, MISREAD, UNDECIDED = 0, 1, 3  # exit codes; 2 is bad input
SIZE = {  # flags, and what they are by default where there is no world
    "num_frames": "17, or 1 for an image model",
    "height": "256, or 64 tokens for an image model",
    "width": "256, or 64 tokens for an image model",
}
ABOUT = f"""\
Compare what a checkpoint predicts through a logits slice with its clean tokens as they are and as every misreading
would have them: late or early by a position, a row or a frame, axes exchanged or reversed, ids shifted. Without --slice
this checks the function that training reads through. Clean tokens are a world's own videos; of a URSA folder, which has
none, they are the teacher's own samples, made once and kept in RUNS/clean_tokens.

exit code: {RIGHT} the slice is right, {MISREAD} it is misread, {UNDECIDED} undecided (the sentence says why),
2 bad input

--slice names a function of yours, in a module or a file, that is called and returns as `extract_visual_logits` does:

  def my_slice(logits, num_visual_tokens, codebook_size):
      # logits (B, S, V): text, BOV and N visual positions; V columns, the last K of them the codes. Returns (B, N, K)
      return logits[:, -(num_visual_tokens + 1) : -1, -codebook_size:]

Where the logits of a clip take more than 128 MiB, it gets the hidden states (B, S, D) and D in place of K instead, as
training does: then shifted ids cannot show, and a smaller --height and --width checks them."""


@dataclasses.dataclass
class Question:
    """The flags of the command; sizes left at None are the checkpoint's."""

    folder: str
    slice: str | None = None
    clips: int | None = None
    passes: int = PASSES
    t: float = NEAR_DATA
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    max_prompt_length: int | None = None
    backend: str = "native"
    device: str = "auto"
    dtype: str = "auto"
    runs: str = "runs"


def add_check_alignment(command, integer, number) -> None:
    """Add the command to the parser; `integer` and `number` parse numbers."""
    sub = command("check-alignment", "name what is wrong with a logits slice, if anything is", ABOUT,
                  configurable=False)  # fmt: skip
    sub.add_argument("folder", help="a checkpoint folder in URSA's layout, or a built-in world")
    sub.add_argument("--slice", metavar="WHERE:FUNCTION", help="module:function or file.py:function, see above")
    sub.add_argument("--clips", type=integer, default=None, help="clips to compare (default: 64, fewer of long videos)")
    sub.add_argument("--passes", type=integer, default=PASSES,
                     help="sampling steps per clip of a URSA folder (default: %(default)s)")  # fmt: skip
    sub.add_argument("--t", type=number, default=NEAR_DATA,
                     help="time to which clean tokens are re-noised, 1 is data (default: %(default)s)")  # fmt: skip
    for name, default in SIZE.items():
        sub.add_argument(f"--{name}", type=integer, help=f"default: the world's, else {default}")
    sub.add_argument("--max_prompt_length", type=integer, help="text tokens (default: as in training)")
    sub.add_argument("--backend", default="native", help="native or upstream (diffnext's transformer)")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--dtype", default="auto", help="as in `dimo sample` (default: bfloat16 on a GPU, else float32)")
    sub.add_argument("--runs", default="runs", help="folder of runs, where samples are kept (default: %(default)s)")


def check_alignment(args: argparse.Namespace) -> int:
    """Print the verdict and the table of readings; returns the exit code."""
    alignment, about = ask(Question(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Question)}))
    print(alignment.sentence, about, "", alignment.table(), sep="\n")
    return RIGHT if alignment.found == "right" else UNDECIDED if alignment.found is None else MISREAD


def ask(q: Question) -> tuple[Alignment, str]:
    """The finder's verdict, and a sentence on what was compared.

    Raises:
        DimoError: the checkpoint, a size or the slice cannot be used.
    """
    if q.clips is not None and q.clips < FEWEST:
        raise DimoError(f"--clips must be at least {FEWEST}, over which standard errors are taken, got {q.clips}")
    if q.max_prompt_length is not None and q.max_prompt_length < 0:
        raise DimoError(f"--max_prompt_length must not be negative, got {q.max_prompt_length}")
    require_time("--t", q.t)
    require_passes("--passes", q.passes)
    slice_ = load_slice(q.slice) if q.slice else None
    folder, device = checkpoint_folder(q.folder), pick_device(q.device)
    ursa = load_ursa(folder, device, DTYPES[pick_dtype(q.dtype, device)], q.backend)
    ursa.transformer.requires_grad_(False)
    given = zip((q.num_frames, q.height, q.width), video_size(folder))
    grid = ursa.latents_shape(*(default if size is None else size for size, default in given))
    length = q.max_prompt_length or default_prompt_length(folder)
    if is_world(folder):
        clean = known_clean_tokens(ursa, grid, q.runs, q.clips)
        if clean is None or clean.latents_shape != grid:
            raise DimoError(f"the videos of {folder.name} have no other size than theirs; leave out the sizes")
    else:
        clean = sampled_clean_tokens(ursa, grid, q.runs, length, q.clips, q.passes)
    dense = logits_fit(ursa, grid, length)
    alignment = check_slice(ursa, clean, length, dense, slice_, q.t)
    read = "logits" if dense else "hidden states, since logits are never made whole at this size: ids are not checked"
    about = (
        f"{len(clean.codes)} clips of {clean.codes.shape[1]:,} tokens at t = {q.t:g}, {clean.source}; read from {read}"
    )
    return alignment, about


def load_slice(name: str) -> Slice:
    """The function that "module:function" or "file.py:function" names.

    Raises:
        DimoError: there is no such file, module or function, or importing it fails.
    """
    where, colon, function = name.rpartition(":")
    if not colon or not where or not function:
        raise DimoError(f"--slice must be module:function or file.py:function, got {name!r}")
    file = Path(where).expanduser()
    if where.endswith(".py") and not file.is_file():
        raise DimoError(f"--slice: there is no file {file}")
    try:
        module = _run_file(file) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # anything can happen in a module of the user's
        raise DimoError(f"--slice: {where} cannot be imported: {type(error).__name__}: {reason(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        others = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(function, others) if others else ""
        raise DimoError(f"--slice: {where} has no function {function}{hint}")
    return found


def _run_file(file: Path):
    sys.path.insert(0, str(file.resolve().parent))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
