"""`DimoError`, whose message is written for the user, and the input checks that raise it."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_trusted = contextvars.ContextVar("trusted", default=False)


class DimoError(ValueError):
    """Invalid input, described in one sentence. Command line and notebooks show the message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: what a cell shows. The exception itself stays, so that papermill fails with it."""
        return [f"{type(self).__name__}: {self}"]


class NonFiniteError(DimoError):
    """NaN or infinity where values must be finite: a bad batch or a diverged run rather than invalid input."""


class Diverged(DimoError):
    """A run that cannot go on since its values are not finite any more: a result, where rates are compared."""


def similar(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: `; did you mean 'beta'?`, or "" if no known one is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint of `similar`, or the list of known names."""
    known = sorted(known)
    listed = map(repr, known) if any("," in other for other in known) else known
    return similar(name, known) or f"; choose from {', '.join(listed)}"


def reason(error: BaseException) -> str:
    """An exception's message on one line: for a parser error with its line number, for an OSError with its path."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}: {problem}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return _reason_of_system(error)
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0].rstrip()
    return " ".join(text.split()) if first.endswith(":") else first  # "...:" introduces a list on the next lines


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Memory of a GPU that is full becomes a DimoError in this context."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DimoError(f"{out_of_memory(error)}. `dimo plan` with the same keys says what needs less") from error


def out_of_memory(error: BaseException) -> str:
    """What a memory that is full says, of a GPU or of this machine; empty for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return reason(error).split(" Including ")[0].rstrip(".")  # the allocator's details follow
    wanted = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))  # torch on a CPU
    if wanted:
        return f"this machine's memory is too small: {int(wanted[1]):,} bytes more were asked for"
    return "this machine's memory is full" if isinstance(error, MemoryError) else ""


def _reason_of_system(error: OSError) -> str:
    path = Path(os.fsdecode(error.filename2 or error.filename))  # a rename fails at its destination
    if isinstance(error, FileExistsError | NotADirectoryError):
        broken = next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)
        if broken:
            return f"{broken} is a link to {os.readlink(broken)}, which does not exist"
        in_the_way = next((p for p in (path, *path.parents) if p.is_file()), path)
        return f"{in_the_way} is a file, but a folder is needed"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, but a file is needed"
    return f"{path}: {error.strerror}"


def require_shape(name: str, tensor: torch.Tensor, shape: tuple) -> None:
    """Raise DimoError unless `tensor` has `shape`. None and letters match any size: ("B", "N", 16)."""
    if not isinstance(tensor, torch.Tensor):
        raise DimoError(f"{name} must be a tensor of shape {_spell(shape)}, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(shape, tensor.shape)
    )
    if not fits:
        raise DimoError(f"{name} must have shape {_spell(shape)}, got {tuple(tensor.shape)}")


def require_ids(name: str, ids: torch.Tensor, upper: int) -> None:
    """Raise DimoError unless `ids` is an integer tensor with all values in [0, upper)."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise DimoError(f"{name} must hold integer ids, got {ids.dtype}")
    if ids.numel() and may_read(ids):
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= upper:
            raise DimoError(f"{name} must lie in [0, {upper}), got values from {low} to {high}")


def require_time(name: str, t: torch.Tensor | float) -> None:
    """Raise DimoError unless every time lies in [0, 1): 0 is noise, 1 (excluded) is data."""
    if isinstance(t, torch.Tensor) and not may_read(t):
        return
    inside = (t >= 0) & (t < 1) if isinstance(t, torch.Tensor) else 0 <= t < 1
    if not bool(inside.all() if isinstance(inside, torch.Tensor) else inside):
        shown = t if not isinstance(t, torch.Tensor) else f"{t.min().item():.4g} to {t.max().item():.4g}"
        raise DimoError(f"{name} must lie in [0, 1), got {shown}")


@contextlib.contextmanager
def trusted_values() -> Iterator[None]:
    """In this context `require_ids` and `require_time` skip the range checks of tensors; dtypes are still checked.

    For callers whose values are in range by construction: on a GPU, reading a value back waits for all queued kernels.
    """
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def may_read(tensor: torch.Tensor) -> bool:
    """Whether a check may read values of `tensor` back: not among trusted ones, nor while a CUDA graph is captured."""
    return not _trusted.get() and not capturing(tensor)


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NonFiniteError if `tensor` holds NaN or infinity."""
    if capturing(tensor) or not tensor.numel():
        return
    if not bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all()):  # aminmax propagates NaN
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(f"{name} must be finite, got {bad} of {tensor.numel()} entries NaN or infinite")


def are_finite(weights: torch.Tensor) -> bool:
    """Whether all entries are finite, judged by their sum in at least float32, which sane weights do not overflow."""
    wide = weights.dtype if weights.element_size() > 2 else torch.float32
    return bool(weights.sum(dtype=wide).isfinite())


def capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured: values cannot be read back then; the warm-up steps have checked them."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _spell(shape: tuple) -> str:
    return "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"
