"""What the teacher says of videos, whoever made them: how likely it finds them, under which prompt, and what it sees.

A video x_1 is re-noised to x_t ~ p_t(. | x_1) at several times t, and the teacher predicts x_1 again. The passes with
and without the prompt give everything: the cross-entropy with and without guidance (the denoising loss on which the
teacher was trained), the share of tokens that it would draw again, and hidden states as features of the video.

Retrieval asks which of k prompts explains a video best, as diffusion classifiers do (Li et al., arXiv 2303.16203), but
by the share of tokens and not by the cross-entropy. A few wrong tokens decide the latter, for each may cost any number
of nats, and costs most under the own prompt, where the teacher is surest of another token.
"""

from __future__ import annotations

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa import Ursa, predict

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # midpoints of five strata of t
RETRIEVAL_UNTIL = 0.5  # later x_t shows so much of the video that the teacher needs no prompt
# Where nearly all of the video can be seen. Features are the hidden states that the head reads, under the empty prompt:
# they hold what the teacher sees in a video, and not the words it was asked for.
FEATURE_TIME = 0.9
CHOICES = 8  # prompts among which the own one is retrieved


def choices(prompts: int, most: int = CHOICES) -> torch.Tensor:
    """The prompts among which each of P prompts is retrieved, (P, k): itself, then k - 1 others drawn at random.

    k is the smaller of P and `most`. The same in every call.
    """
    if prompts < 1 or most < 1:
        raise DimoError(f"prompts and most must be at least 1, got {prompts} and {most}")
    g, k = torch.Generator().manual_seed(0), min(prompts, most)
    others = torch.stack([torch.randperm(prompts - 1, generator=g)[: k - 1] for _ in range(prompts)])
    own = torch.arange(prompts)[:, None]
    return torch.cat([own, others + (others >= own)], 1)


def passes(prompts: int) -> int:
    """Transformer passes of `judge` for a video, if k is min(prompts, CHOICES); guidance costs none."""
    return 2 * len(TIMES) + sum(t <= RETRIEVAL_UNTIL for t in TIMES) * (min(prompts, CHOICES) - 1)


@torch.no_grad()
def judge(
    ursa: Ursa,
    codes: torch.Tensor,
    txt_ids: torch.Tensor,
    uncond_ids: torch.Tensor,
    grid: tuple[int, int, int],
    generator: torch.Generator,
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    times: tuple[float, ...] = TIMES,
) -> dict[str, torch.Tensor]:
    """What the teacher, the transformer of `ursa`, says of videos. Full logits are never materialised.

    Args:
        codes: x_1, (B, N) in [0, K).
        txt_ids: (B, k, L), the prompt of each video, then k - 1 other ones.
        uncond_ids: (1, L) ids of the empty or negative prompt.
        grid: latents_shape (T, H, W).
        generator: draws the noise of x_t, whose amount does not depend on the codes.
        guidance_scale: of the guided prediction.
        guidance_trunc: guidance is off where t >= this.
        times: values of t in [0, 1), the least at most RETRIEVAL_UNTIL; features come from the one nearest to
            FEATURE_TIME, retrieval from all up to RETRIEVAL_UNTIL.

    Returns:
        nll and, above guidance_scale 1, nll_guided, each (B, len(times)): -log p(x_1 | x_t) with the prompt and guided,
        in nats per token. recovered and recovered_uncond, each (B, len(times)): p(x_1 | x_t) with the prompt and
        without, the mean over tokens. choice_recovered (B, k): recovered under each of the k prompts, the mean over the
        times of retrieval. features (B, D): hidden states without the prompt, averaged over tokens.
    """
    require_shape("codes", codes, ("B", "N"))
    require_shape("txt_ids", txt_ids, (len(codes), "k", "L"))
    require_shape("uncond_ids", uncond_ids, (1, txt_ids.shape[2]))
    require_ids("codes", codes, ursa.path.codebook_size)
    network, own, empty = ursa.transformer, txt_ids[:, 0], uncond_ids.expand(len(codes), -1)
    at_features = min(times, key=lambda t: abs(t - FEATURE_TIME))
    names = ("nll", "nll_guided", "recovered", "recovered_uncond", "choice_recovered")
    made: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for t in times:
        x_t = ursa.path.sample(codes, t, generator)
        cond, uncond = predict(network, own, x_t, grid), predict(network, empty, x_t, grid)
        log_prob = cond.log_prob(codes)
        made["nll"].append(-log_prob.mean(1))
        made["recovered"].append(log_prob.exp().mean(1))
        made["recovered_uncond"].append(uncond.log_prob(codes).exp().mean(1))
        if guidance_scale > 1:
            guided = cond.guided(uncond, guidance_scale) if t < guidance_trunc else cond
            made["nll_guided"].append(-guided.log_prob(codes).mean(1))
        if t == at_features:
            features = uncond.states.float().mean(1)
        if t <= RETRIEVAL_UNTIL:
            others = [predict(network, ids, x_t, grid).log_prob(codes) for ids in txt_ids[:, 1:].unbind(1)]
            made["choice_recovered"].append(torch.stack([log_prob, *others], 1).exp().mean(2))
    found = {name: torch.stack(parts, 1) for name, parts in made.items() if parts}
    return found | {"choice_recovered": found["choice_recovered"].mean(1), "features": features}
