"""Decided or collapsed, token by token: what one pass leaves open, and what its noise decides (`dimo.views.collapse`).

H(mean p) = mean H(p) + I(x_hat; noise) over the noises of one prompt, here for every token of a video. Passes leave
hidden states; logits are made for a few tokens at a time over all noises, so that N x K of them are never held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dimo.errors import DimoError
from dimo.ursa import predict
from dimo.ursa.chunks import tokens_at_once, without_compiling
from dimo.views.collapse import Mixture
from dimo.views.models import Grid, Models
from dimo.views.reading import clips_at_once

NOISES, FEWEST = 64, 8  # of a map
TOKENS = {"cuda": 2**17, "cpu": 2**12}  # in all passes of a map: one to three seconds
NETWORK = {"conditional": "teacher", "one_pass": "student"}  # predictions that are asked, and by which network
Pass = Any  # a Dense, Chunked or Sparse prediction


def noises_of(latents_shape: Grid, device: torch.device) -> int:
    """How many noises a map takes: 64, or as many as `TOKENS` allows, but at least 8. I is at most their logarithm."""
    return max(FEWEST, min(NOISES, TOKENS.get(device.type, TOKENS["cuda"]) // math.prod(latents_shape)))


@torch.no_grad()
def noise_maps(models: Models, txt_ids: torch.Tensor, name: str, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """What one pass from x_init leaves open for every token, and what the noise decides.

    The noises are the same in every call, so that networks and steps can be compared.

    Args:
        txt_ids: (1, L), the prompt.
        name: "conditional", the teacher, or "one_pass", the student.
        temperature: all logits are divided by it.

    Returns:
        {"mean_entropy": mean H(p), "information": I(x_hat; noise)} in nats, each (N,) float32; I is at most
        the logarithm of `noises_of`.
    """
    network, n = models.networks[NETWORK[name]], math.prod(models.grid)
    g = torch.Generator(models.device).manual_seed(0)
    size = noises_of(models.grid, models.device), n
    x_init = torch.randint(models.ursa.path.codebook_size, size, generator=g, device=g.device)
    with without_compiling():  # a few passes
        passes = [
            predict(network, txt_ids.expand(len(x), -1), x, models.grid, t=0.0).detach()
            for x in x_init.split(clips_at_once(n))
        ]
        return entropies_over(passes, temperature)


@torch.no_grad()
def entropies_over(passes: Sequence[Pass], temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """`noise_maps` of predictions, each (b, N), of all noises of one prompt.

    Raises:
        DimoError: there are none.
    """
    if not passes:
        raise DimoError("passes must hold at least one batch of noises")
    (_, n), device, found = passes[0].shape, passes[0].device, []
    for tokens in torch.arange(n, device=device).split(tokens_at_once(passes[0].codebook_size, device)):
        mixture = Mixture(temperature)
        for one in passes:
            mixture.add(one.of_tokens(tokens))
        found.append(mixture.entropies())
    whole, left_open = (torch.cat(part) for part in zip(*found))
    return {"mean_entropy": left_open, "information": (whole - left_open).clamp(min=0)}  # below 0 by rounding alone
