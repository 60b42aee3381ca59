"""Reference-free metrics: what can be measured of a sampler where neither an oracle nor real videos say what is right.

No figure here says that a video is good. A low teacher_nll says that the teacher finds the tokens plausible, which a
frozen or repeated video can be too: read it beside diversity and codes_used.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch

from dimo.errors import require_shape
from dimo.files import save_file, whole_file
from dimo.ursa import Ursa, UrsaTransformer, predict
from dimo.ursa.chunks import tokens_at_once

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which teacher_nll re-noises
Grid = tuple[int, int, int]


@torch.no_grad()
def pass_entropy(
    network: UrsaTransformer, txt_ids: torch.Tensor, x_t: torch.Tensor, grid: Grid,
    guidance_scale: float = 1.0, uncond_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Entropy in nats of every token that one pass at x_t (B, N) predicts under txt_ids (B, L) -> (B, N).

    With guidance_scale > 1 of the guided prediction, away from uncond_ids (1, L). Logits are never made whole.
    """
    codebook_size = network.config.vocab_size - network.config.lm_vocab_size
    videos = max(1, tokens_at_once(codebook_size, x_t.device) // x_t.shape[1])
    parts = []
    for ids, x in zip(txt_ids.split(videos), x_t.split(videos)):
        prediction = predict(network, ids, x, grid)
        if guidance_scale > 1:
            uncond = predict(network, uncond_ids.expand_as(ids), x, grid)
            prediction = prediction.guided(uncond, guidance_scale)
        parts.append(prediction.entropy())
    return torch.cat(parts)


@torch.no_grad()
def teacher_nll(
    ursa: Ursa,
    codes: torch.Tensor,
    txt_ids: torch.Tensor,
    grid: Grid,
    generator: torch.Generator,
    times: tuple[float, ...] = TIMES,
) -> torch.Tensor:
    """-log p_T(x_1 | x_t, prompt) of codes x_1 (B, N) under the unguided teacher, x_t drawn from the path at `times`.

    Mean over tokens and times, in nats per token: (B,). The noise is the generator's, whatever the codes are.
    """
    total = torch.zeros(len(codes), device=codes.device)
    for t in times:
        for i, (ids, x_1) in enumerate(zip(txt_ids.split(1), codes.split(1))):
            prediction = predict(ursa.transformer, ids, ursa.path.sample(x_1, t, generator), grid)
            total[i] -= prediction.log_prob(x_1).mean()
    return total / len(times)


def diversity(codes: torch.Tensor) -> float | None:
    """Mean share of tokens in which two of V videos of one prompt differ; codes (P, V, N). None where V is 1."""
    require_shape("codes", codes, ("P", "V", "N"))
    pairs = list(itertools.combinations(range(codes.shape[1]), 2))
    return sum((codes[:, i] != codes[:, j]).float().mean().item() for i, j in pairs) / len(pairs) if pairs else None


def save_codes(file: Path, codes: dict[str, torch.Tensor], prompts: list[str], grid: Grid) -> None:
    """Codes (B, T, H, W) by row, to be decoded anywhere; the prompt of each video is in the metadata, as JSON."""
    with whole_file(file) as beside:
        save_file({name: c.view(-1, *grid) for name, c in codes.items()}, beside, {"prompts": json.dumps(prompts)})
