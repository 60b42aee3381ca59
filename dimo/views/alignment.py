"""Which misalignment a logits slice has, if any: the same predictions against targets that are moved.

A slice that is read one position late, with height and width exchanged or with ids shifted still runs, and its losses
fall a little. But near the data, at t >= 0.9, a trained network knows most clean codes, and its cross-entropy is lowest
against the targets that it really predicts. Every kind of misreading is a way to move the targets, so that one pass and
a gather each tell them apart. Moved targets may be cheaper merely because their codes are frequent; so what counts is
how much better a reading fits than the same reading of other clips.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.prediction import Prediction

SIGNIFICANT = 4.0  # standard errors, over clips, by which one reading must fit better than another
OTHERS = (2, 3, 5)  # how many clips further the clips are whose targets a reading is compared with
FEWEST = 8  # clips
LEAST = 0.1  # nats per token by which the best reading must fit better than that of other clips: it knows something
UNNAMED = "no known reading"  # what is found of a slice that is wrong in a way that no reading here describes
Grid = tuple[int, int, int]


@dataclasses.dataclass
class Reading:
    """How well predictions fit one reading of the targets.

    Attributes:
        says: what is wrong with the slice if this reading fits best, as the end of a sentence.
        nats: mean cross-entropy against the moved targets, in nats per token.
        worse: how much less it gains over other clips' targets than the unmoved reading does, the mean of the paired
            difference in nats per token; below 0 it fits better.
        error: standard error of `worse`, over clips.
    """

    says: str
    nats: float
    worse: float
    error: float


@dataclasses.dataclass
class Alignment:
    """What a slice reads.

    Attributes:
        readings: by name.
        found: the reading that the predictions fit: "right", another's name, UNNAMED, or None for undecided.
        sentence: the verdict.
    """

    readings: dict[str, Reading]
    found: str | None
    sentence: str

    def table(self) -> str:
        """The readings, best first: cross-entropy, and how much worse than the right one, with its standard error."""
        lines = [f"{'the slice ...':30} {'cross-entropy':>13}  {'worse than right by':>22}"]
        for name, r in sorted(self.readings.items(), key=lambda item: item[1].worse):
            worse = f"{r.worse:+.3f} +- {r.error:.3f}" if name != "right" else "-"
            lines.append(f"{r.says:30} {r.nats:13.3f}  {worse:>22}")
        return "\n".join([*lines, "in nats per token; worse by the gain over other clips' targets"])


def moved_targets(codes: torch.Tensor, latents_shape: Grid, codebook_size: int) -> dict[str, tuple[str, torch.Tensor]]:
    """{name: (what it says, targets)} of every reading, codes (B, N) of latents (T, H, W); -1 where there is no target.

    Some may leave these codes as they are, such as reversed frames of one frame.
    """
    frames, height, width = latents_shape
    video = codes.view(-1, frames, height, width)
    found = {"right": ("is right", codes)}
    steps = {"position": 1, "two positions": 2, "row": width, "frame": height * width}
    for what, by in steps.items():
        amount = what if what.startswith("two") else f"one {what}"
        for late in (True, False):
            found[f"{what} {'late' if late else 'early'}"] = (
                f"is read {amount} {'late' if late else 'early'}", _shifted(codes, by if late else -by),
            )  # fmt: skip
    found["height and width exchanged"] = ("has height and width exchanged", video.transpose(2, 3).flatten(1))
    found["frames last"] = ("runs over frames first", video.permute(0, 2, 3, 1).flatten(1))
    if height != width:  # of a square both exchanges are the same
        back = codes.view(-1, frames, width, height).transpose(2, 3).flatten(1)
        found["width and height exchanged"] = ("takes height for width", back)
    for axis, name in ((1, "frames reversed"), (2, "rows reversed"), (3, "columns reversed")):
        found[name] = (f"has its {name}", video.flip(axis).flatten(1))
    for by in (1, 2, -1, -2):
        found[f"ids {by:+d}"] = (f"has its ids shifted by {by:+d}", (codes + by) % codebook_size)
    found["samples shifted"] = ("belongs to the sample after", codes.roll(-1, 0))
    return found


def _shifted(codes: torch.Tensor, by: int) -> torch.Tensor:
    """codes (B, N) -> targets (B, N) whose i-th is the (i + by)-th code; -1 beyond the ends."""
    moved = torch.full_like(codes, -1)
    if abs(by) >= codes.shape[1]:
        return moved
    if by > 0:
        moved[:, :-by] = codes[:, by:]
    else:
        moved[:, -by:] = codes[:, :by]
    return moved


def find_misalignment(
    predictions: Prediction | Iterable[Prediction], codes: torch.Tensor, latents_shape: Grid
) -> Alignment:
    """Compare what a slice predicts with its targets as they are and as every misreading would have them.

    Args:
        predictions: of the clean tokens at some x_t, by the slice in question, for all clips or for a few after the
            other. They are asked in turn and not kept, so that 64 clips of 33,280 tokens need no more memory than the
            largest of them. 64 clips at t >= 0.9 tell the readings apart; at t = 0.3 margins are a few hundredths of
            a nat.
        codes: the clean tokens (B, N) that x_t was made of.
        latents_shape: (T, H, W).

    Raises:
        DimoError: shapes that do not fit each other, ids out of range, or fewer than FEWEST clips.
    """
    require_shape("codes", codes, ("B", "N"))
    if math.prod(latents_shape) != codes.shape[1]:
        raise DimoError(f"latents_shape must hold {codes.shape[1]} tokens as codes do, got {tuple(latents_shape)}")
    if len(codes) < FEWEST:
        raise DimoError(
            f"codes must hold at least {FEWEST} clips, over which standard errors are taken, got {len(codes)}"
        )
    parts, start = [], 0
    for one in [predictions] if isinstance(predictions, Prediction) else predictions:
        rows = slice(start, start + one.shape[0])
        if one.shape != tuple(codes[rows].shape):
            raise DimoError(f"codes must have shape {one.shape}, as predictions do, got {tuple(codes[rows].shape)}")
        require_ids("codes", codes[rows], one.codebook_size)
        parts.append(_compare(one, codes, rows, latents_shape))
        start = rows.stop
    if start != len(codes):
        raise DimoError(f"predictions must be of all {len(codes)} clips of codes, got {start}")
    nats, gain, known, moves = (torch.cat(tensors) for tensors in zip(*parts))
    every = moved_targets(codes[:1], latents_shape, one.codebook_size).items()
    kept = [i for i, (name, _) in enumerate(every) if name == "right" or moves[:, i].any()]
    nats, gain, known = nats[:, kept].mean(0), gain[..., kept], known[..., kept]
    readings = {}
    for i, (name, (says, _)) in enumerate([list(every)[at] for at in kept]):
        worse, error = _paired(gain[..., i] - gain[..., 0], known[..., i])
        readings[name] = Reading(says, nats[i].item(), worse, error)
    return _judged(readings, gain, known)


def _compare(prediction: Prediction, codes: torch.Tensor, rows: slice, latents_shape: Grid) -> tuple[torch.Tensor, ...]:
    """Some of the clips b against every reading of their own targets and of other clips'.

    Returns:
        On the CPU: nats (b, R), the mean of the known targets; gain (b, N, R), how much cheaper a target is than those
        of other clips; known (b, N, R), where there is a target; moves (b, R), whether any target is another.
    """
    size = prediction.codebook_size
    own, *others = (
        torch.stack([moved for _, moved in moved_targets(codes.roll(by, 0)[rows], latents_shape, size).values()], -1)
        for by in (0, *OTHERS)
    )  # each (b, N, R)
    targets = torch.cat([own, *others], -1).clamp(min=0).to(prediction.device)
    nats = -prediction.map(_log_probs, targets)[0].cpu().unflatten(-1, (-1, own.shape[-1]))  # (b, N, 1 + others, R)
    own, known = own.cpu(), own.cpu() >= 0
    mean = (nats[:, :, 0].double() * known).sum(1) / known.sum(1).clamp(min=1)
    moves = ((own != own[..., :1]) & known).any(1)
    return mean, nats[:, :, 0].double().sub(nats[:, :, 1:].double().mean(2)).float(), known, moves


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
    return ((logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)),)


def _paired(difference: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
    """Mean over the tokens (B, N) that count, the same in every clip, and its standard error over clips."""
    per_clip = (difference * where).double().sum(1) / where.sum(1)
    return per_clip.mean().item(), per_clip.std().item() / math.sqrt(len(per_clip))


def _judged(readings: dict[str, Reading], gain: torch.Tensor, known: torch.Tensor) -> Alignment:
    names = list(readings)
    best = min(names, key=lambda name: readings[name].worse)
    at, rivals = names.index(best), {}
    for i, name in enumerate(names):
        common = known[..., i] & known[..., at]
        if name != best and common.any():
            worse, error = _paired(gain[..., i] - gain[..., at], common)
            rivals[name] = worse > SIGNIFICANT * error
    knows = -_paired(gain[..., at], known[..., at])[0] > LEAST
    if knows and all(rivals.values()):
        reading, right = readings[best], readings["right"]
        if best == "right":
            closest = min((name for name in names if name != best), key=lambda name: readings[name].worse)
            more = f"by {readings[closest].worse:.3f} nats per token at least"
            return Alignment(readings, best, f"the slice is right: it fits its targets better than moved ones, {more}")
        fits = f"it fits those targets better, with {reading.nats:.3f} nats per token against {right.nats:.3f}"
        return Alignment(readings, best, f"the slice {reading.says}: {fits}")
    open_between = [best, *(name for name, lost in rivals.items() if not (knows and lost))]
    more = f" and {len(open_between) - 4} more" if len(open_between) > 4 else ""
    why = "the network does not know the clean tokens well enough; take more clips, or t nearer to 1"
    return Alignment(readings, None, f"undecided between {', '.join(open_between[:4])}{more}: {why}")
