"""Reference-free metrics, for samplers whose videos can be compared neither with an oracle nor with real videos.

None of them shows that a video is good. A low teacher_nll says that the teacher finds the tokens plausible, which also
holds for a static or repeated video, so read it together with diversity and codes_used.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch

from dimo.errors import DimoError, require_shape
from dimo.files import save_file, whole_file
from dimo.ursa import UrsaTransformer, predict
from dimo.ursa.chunks import tokens_at_once

Grid = tuple[int, int, int]


@torch.no_grad()
def pass_entropy(
    network: UrsaTransformer, txt_ids: torch.Tensor, x_t: torch.Tensor, grid: Grid,
    guidance_scale: float = 1.0, uncond_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Entropy of the prediction of one pass, per token. Full logits are never materialised.

    Args:
        txt_ids: (B, L).
        x_t: (B, N) input codes.
        grid: latents_shape (T, H, W).
        guidance_scale: above 1, the entropy is that of the guided prediction.
        uncond_ids: (1, L) ids of the negative prompt.

    Returns:
        (B, N), in nats.
    """
    if guidance_scale > 1 and uncond_ids is None:
        raise DimoError("uncond_ids is needed when guidance_scale is above 1: the ids of the empty prompt, (1, L)")
    codebook_size = network.config.vocab_size - network.config.lm_vocab_size
    videos = max(1, tokens_at_once(codebook_size, x_t.device) // x_t.shape[1])
    parts = []
    for ids, x in zip(txt_ids.split(videos), x_t.split(videos)):
        prediction = predict(network, ids, x, grid)
        if uncond_ids is not None and guidance_scale > 1:
            uncond = predict(network, uncond_ids.expand_as(ids), x, grid)
            prediction = prediction.guided(uncond, guidance_scale)
        parts.append(prediction.entropy())
    return torch.cat(parts)


def diversity(codes: torch.Tensor) -> float | None:
    """Mean share of tokens in which two of the V videos of a prompt differ, codes (P, V, N); None if V is 1."""
    require_shape("codes", codes, ("P", "V", "N"))
    pairs = list(itertools.combinations(range(codes.shape[1]), 2))
    return sum((codes[:, i] != codes[:, j]).float().mean().item() for i, j in pairs) / len(pairs) if pairs else None


def save_codes(file: Path, codes: dict[str, torch.Tensor], prompts: list[str], grid: Grid) -> None:
    """Save codes of each row as (B, T, H, W), with the prompts of the B videos as JSON in the metadata."""
    with whole_file(file) as beside:
        save_file({name: c.view(-1, *grid) for name, c in codes.items()}, beside, {"prompts": json.dumps(prompts)})
