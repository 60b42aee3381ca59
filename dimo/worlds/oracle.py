"""The exact oracle of the shapes world: how valid, how faithful and how varied a set of videos is.

The nearest valid video is found exactly and without listing all valid videos: for every place the object can be
(shape x direction x start), the best object code and the best background code are independent of each other, so
counting each code inside and outside the object's mask suffices.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, require_ids, require_shape
from dimo.worlds.shapes import COLOURS, ShapesWorld

CHUNK = 1024  # videos scored at once


@dataclasses.dataclass
class Scores:
    """Per video, all (B,). Position and shades are those of the nearest valid video, meaningful where it is valid.

    accuracy: share of tokens equal to the nearest valid video's, of any prompt.
    valid: the video is exactly a valid video, of any prompt.
    adherent: no valid video of another prompt is nearer than the nearest one of the own prompt.
    """

    accuracy: torch.Tensor
    valid: torch.Tensor
    adherent: torch.Tensor
    position: torch.Tensor
    object_shade: torch.Tensor
    background_shade: torch.Tensor
    prompt: torch.Tensor


def score(world: ShapesWorld, codes: torch.Tensor, prompts: list[str]) -> Scores:
    """Score codes (B, N) or (B, T, H, W), in [0, K), against their prompts (B)."""
    if isinstance(codes, torch.Tensor) and codes.dim() == 4:
        require_shape("codes", codes, ("B", *world.latents_shape))
        codes = codes.flatten(1)
    require_shape("codes", codes, ("B", world.num_visual_tokens))
    require_ids("codes", codes, world.codebook_size)
    if len(prompts) != len(codes) or not prompts:
        raise DimoError(f"prompts must name one prompt per video ({len(codes)}), got {len(prompts)}")
    attributes = world.attributes(prompts).to(codes.device)
    parts = [_score(world, c, a) for c, a in zip(codes.split(CHUNK), attributes.split(CHUNK))]
    return Scores(*(torch.cat([p[i] for p in parts]).cpu() for i in range(7)))


def _score(world: ShapesWorld, codes: torch.Tensor, attributes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shapes, directions, positions, n = world.masks.shape
    onehot = F.one_hot(codes, world.codebook_size).float()
    masks = world.masks.to(codes.device).view(-1, n).float()
    inside = torch.einsum("bnk,mn->bmk", onehot, masks)
    background, b_shade = (onehot.sum(1)[:, None] - inside)[..., : world.background_shades].max(-1)
    colours = inside[..., world.background_shades :].unflatten(-1, (len(COLOURS), world.object_shades))
    objects, o_shade = colours.max(-1)
    matches = (objects + background[..., None]).view(-1, shapes, directions, positions, len(COLOURS))
    best, where = matches.flatten(1).max(-1)
    row = torch.arange(len(codes), device=codes.device)
    own = matches[row, attributes[:, 1], attributes[:, 2], :, attributes[:, 0]].max(-1).values
    place, colour = where // len(COLOURS), where % len(COLOURS)
    shades = o_shade[row, place, colour], b_shade[row, place]
    motions = directions * shapes
    prompt = attributes[:, 0] * motions + attributes[:, 1] * directions + attributes[:, 2]
    return best / n, best == n, own == best, place % positions, *shades, prompt


def entropy(counts: torch.Tensor) -> float:
    """Entropy in nats of the distribution behind counts (bins,), by Grassberger's estimator.

    H = log n - (1/n) sum_i n_i G(n_i), G(n) = psi(n) + (-1)^n / 2 (psi((n+1)/2) - psi(n/2)): the plug-in estimate of
    16 equal bins from 50 draws is 0.16 nats too low, this one is not (arXiv physics/0307138, eq. 30).
    """
    counts = counts[counts > 0].double()
    total = counts.sum()
    if total == 0:
        raise DimoError("counts must hold at least one draw to have an entropy")
    sign = 1 - 2 * (counts % 2)
    g = torch.digamma(counts) + sign / 2 * (torch.digamma((counts + 1) / 2) - torch.digamma(counts / 2))
    return float(total.log() - (counts * g).sum() / total)


def coverage(labels: torch.Tensor, bins: int) -> float | None:
    """Entropy of labels (n,) in [0, bins) as a share of log(bins); None (undefined) with fewer draws than bins."""
    if bins == 1 or len(labels) < bins:
        return None
    return min(1.0, entropy(torch.bincount(labels, minlength=bins)) / math.log(bins))


def summarise(world: ShapesWorld, scores: Scores) -> dict:
    """Means over videos, and coverage over the valid videos of the right prompt.

    `coverage` is the smallest of four: start positions and shades, pooled and per prompt (the mean over prompts with
    enough valid videos). Each is None where too few videos are valid, and so is `coverage` then.
    """
    good = scores.valid & scores.adherent
    shades = scores.object_shade * world.background_shades + scores.background_shade
    kinds = {
        "positions": (scores.position, world.num_positions),
        "shades": (shades, world.object_shades * world.background_shades),
    }
    detail = {}
    for name, (labels, bins) in kinds.items():
        detail[name] = coverage(labels[good], bins)
        per_prompt = [coverage(labels[good & (scores.prompt == p)], bins) for p in scores.prompt.unique()]
        defined = [c for c in per_prompt if c is not None]
        # half of the prompts must count, or the figure would describe the easy ones only
        enough = len(defined) * 2 >= len(per_prompt)
        detail[f"{name}_per_prompt"] = sum(defined) / len(defined) if defined and enough else None
    known = [value for value in detail.values() if value is not None]
    return {
        "validity": scores.valid.float().mean().item(),
        "adherence": scores.adherent.float().mean().item(),
        "token_accuracy": scores.accuracy.float().mean().item(),
        "coverage": min(known) if len(known) == len(detail) else None,
        "coverage_detail": detail,
        "videos": len(scores.valid),
    }
