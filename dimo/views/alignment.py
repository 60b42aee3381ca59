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

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.prediction import Prediction

SIGNIFICANT = 4.0  # standard errors, over clips, by which one reading must fit better than another
OTHERS = (2, 3, 5)  # how many clips further the clips are whose targets a reading is compared with
FEWEST = 8  # clips
LEAST = 0.1  # nats per token by which the best reading must fit better than that of other clips: it knows something
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
    """The readings by name, which of them the predictions fit ("right", another's name, or None), and a sentence."""

    readings: dict[str, Reading]
    found: str | None
    sentence: str


def moved_targets(codes: torch.Tensor, latents_shape: Grid, codebook_size: int) -> dict[str, tuple[str, torch.Tensor]]:
    """{name: (what it says, targets)} of every reading, codes (B, N) of latents (T, H, W); -1 where there is no target.

    Readings that leave these sizes as they are, such as reversed frames of one frame, are left out.
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
    for axis, name in ((1, "frames reversed"), (2, "rows reversed"), (3, "columns reversed")):
        found[name] = (f"has its {name}", video.flip(axis).flatten(1))
    for by in (1, 2, -1, -2):
        found[f"ids {by:+d}"] = (f"has its ids shifted by {by:+d}", (codes + by) % codebook_size)
    found["samples shifted"] = ("belongs to the sample after", codes.roll(-1, 0))
    return {
        name: (says, moved)
        for name, (says, moved) in found.items()
        if name == "right" or bool(((moved != codes) & (moved >= 0)).any())
    }


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


def find_misalignment(prediction: Prediction, codes: torch.Tensor, latents_shape: Grid) -> Alignment:
    """Compare what a slice predicts with its targets as they are and as every misreading would have them.

    Args:
        prediction: of the clean tokens (B, N) at some x_t, by the slice in question. 64 clips at t >= 0.9 tell the
            readings apart; at t = 0.3 margins are a few hundredths of a nat.
        codes: the clean tokens (B, N) that x_t was made of.
        latents_shape: (T, H, W).

    Raises:
        DimoError: shapes that do not fit each other, ids out of range, or fewer than FEWEST clips.
    """
    require_shape("codes", codes, prediction.shape)
    require_ids("codes", codes, prediction.codebook_size)
    if math.prod(latents_shape) != codes.shape[1]:
        raise DimoError(f"latents_shape must hold {codes.shape[1]} tokens as codes do, got {tuple(latents_shape)}")
    if len(codes) < FEWEST:
        raise DimoError(
            f"codes must hold at least {FEWEST} clips, over which standard errors are taken, got {len(codes)}"
        )
    targets = moved_targets(codes, latents_shape, prediction.codebook_size)
    moved = torch.stack([target for _, target in targets.values()], -1)  # (B, N, R)
    all_targets = torch.cat([moved, *(moved.roll(by, 0) for by in OTHERS)], -1)
    nats = -prediction.map(_log_probs, all_targets.clamp(min=0))[0].double().unflatten(-1, (-1, len(targets)))
    gain, known = nats[:, :, 0] - nats[:, :, 1:].mean(2), moved >= 0  # (B, N, R)
    readings = {}
    for i, (name, (says, _)) in enumerate(targets.items()):
        worse, error = _paired(gain[..., i] - gain[..., 0], known[..., i])
        readings[name] = Reading(says, nats[:, :, 0, i][known[..., i]].mean().item(), worse, error)
    return _judged(readings, gain, known)


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
    return ((logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)),)


def _paired(difference: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
    """Mean over the tokens (B, N) that count, the same in every clip, and its standard error over clips."""
    per_clip = (difference * where).sum(1) / where.sum(1)
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
