"""Decided or collapsed: how much of what a student makes comes from its noise.

A one-step student should be decided, since its single pass must leave nothing open. Its entropy is then low, but so is
that of a student that makes one video whatever the noise. Over the noises of one prompt the two differ:

    H(mean p) = mean H(p) + I(x_hat; noise)

with p the student's distribution of a token given the noise. mean H(p) is what it leaves open, and the mutual
information I is what the noise decides, at most log n for n noises. Low mean H(p) is "decided", low I "collapsed". A
teacher that samples in many passes has no p: its codes are compared with the student's by their plug-in entropy at
equal n, which is at most log n, too, and by their spread in the codebook's space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.chunks import without_compiling
from dimo.ursa.prediction import Chunked, Dense, predict
from dimo.ursa.probability_path import MetricPath, MixturePath
from dimo.ursa.sampler import inputs_of_passes
from dimo.ursa.transformer import UrsaTransformer

TOKENS, NOISES = 256, 64  # of a video's N tokens; of a prompt
# The share of the teacher's spread, or of its samples' entropy, below which a student has collapsed. One that has not
# learnt anything yet has .59 or more of each, at every gain, and healthy ones have .9 (docs/experiments.md).
COLLAPSED = 0.4
Grid = tuple[int, int, int]


@dataclasses.dataclass
class OverNoises:
    """A student's one-pass predictions over n noises of a prompt, on M tokens; a dimension P comes first for P prompts.

    Attributes:
        entropy_of_mean: H(mean p) of every token in nats, (M,) or (P, M).
        mean_entropy: mean H(p) of every token in nats, of the same shape.
        codes: a sample of every prediction, (n, M) or (P, n, M).
    """

    entropy_of_mean: torch.Tensor
    mean_entropy: torch.Tensor
    codes: torch.Tensor

    @property
    def mutual_information(self) -> torch.Tensor:
        """I(x_hat; noise) of every token in nats, (M,) or (P, M): from 0 to log n."""
        return (self.entropy_of_mean - self.mean_entropy).clamp(min=0)  # below 0 by rounding alone


class Mixture:
    """Mean over noises of the distributions of M tokens, and of their entropies: it holds (M, K), never n x M logits.

    Args:
        temperature: all logits are divided by it.
    """

    def __init__(self, temperature: float = 1.0):
        self.noises, self.temperature = 0, temperature

    def add(self, prediction: Dense | Chunked) -> None:
        """Add b noises: predictions (b, M) of the tokens."""
        b, m = prediction.shape
        if not self.noises:
            self._p = torch.zeros(m, prediction.codebook_size, device=prediction.device)
            self._entropy = torch.zeros(m, device=prediction.device)
        token = torch.arange(m, device=prediction.device).repeat(b)
        for rows in prediction.row_chunks():
            p = (prediction.logits(rows) / self.temperature).softmax(-1)
            self._p.index_add_(0, token[rows], p)
            self._entropy.index_add_(0, token[rows], torch.special.entr(p).sum(-1))
        self.noises += b

    def entropies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """H(mean p) and mean H(p) of every token in nats, each (M,)."""
        return torch.special.entr(self._p / self.noises).sum(-1), self._entropy / self.noises


def choose_tokens(latents_shape: Grid, most: int = TOKENS) -> tuple[torch.Tensor, Grid]:
    """Choose at most `most` tokens of a video, evenly spaced in each axis, so that they can be drawn as a small video.

    Args:
        latents_shape: (T, H, W).
        most: at least 1. Latent frames are left out only if there are more than this.

    Returns:
        (indices (M,) in [0, T*H*W), ascending; latents_shape (T', H', W') of the chosen ones, M = T'*H'*W').
    """
    if len(latents_shape) != 3 or min(latents_shape) < 1 or most < 1:
        raise DimoError(f"latents_shape must be (T, H, W) and most at least 1, got {tuple(latents_shape)} and {most}")
    frames, height, width = latents_shape
    t = min(frames, most)
    h = min(height, most // t, max(1, int(height * math.sqrt(most / (t * height * width)))))
    w = min(width, most // (t * h))
    at = [(torch.arange(n) * size + size // 2) // n for n, size in zip((t, h, w), latents_shape)]
    return ((at[0][:, None, None] * height + at[1][:, None]) * width + at[2]).flatten(), (t, h, w)


@torch.no_grad()
def over_noises(
    predictions: Iterable[Dense | Chunked], tokens: torch.Tensor, generator: torch.Generator | None = None
) -> OverNoises:
    """Entropies and samples over the noises of one prompt. Only a sum (M, K) of p is kept, never n x M logits.

    Args:
        predictions: one-pass predictions at x_init in batches, each (b, N): n noises in total.
        tokens: indices (M,) of the tokens to look at, in [0, N), as from `choose_tokens`.
        generator: draws the samples.

    Raises:
        DimoError: no predictions, or a token out of range.
    """
    require_shape("tokens", tokens, ("M",))
    mixture, codes = Mixture(), []
    for prediction in predictions:
        require_ids("tokens", tokens, prediction.shape[1])
        chosen = prediction.detach().of_tokens(tokens)
        with without_compiling():  # a few passes
            codes.append(chosen.sample(generator)[0])
        mixture.add(chosen)
    if not codes:
        raise DimoError("predictions must hold at least one batch of noises")
    return OverNoises(*mixture.entropies(), torch.cat(codes))


def student_over_noises(
    network: UrsaTransformer,
    path: MetricPath | MixturePath,
    txt_ids: torch.Tensor,
    latents_shape: Grid,
    tokens: torch.Tensor,
    noises: int = NOISES,
    batch_size: int = NOISES,
    dense: bool = False,
    times: Sequence[float] = (0.0,),
    draft_gain: float = 1.0,
) -> OverNoises:
    """`over_noises` for several prompts, at noise that is the same in every call, whatever else was drawn.

    The last pass of a student of several is measured. Its noise is all that was drawn before: x_init, drafts and jumps.

    Args:
        network: the student.
        txt_ids: (P, L) prompts.
        latents_shape: (T, H, W).
        tokens: indices (M,) of the tokens to look at, as from `choose_tokens`.
        noises: n, for every prompt.
        batch_size: noises per pass.
        dense: as in `predict`.
        times, draft_gain: of a student of several passes, see `inputs_of_passes`.

    Returns:
        Entropies (P, M) and codes (P, n, M).
    """
    require_shape("txt_ids", txt_ids, ("P", "L"))
    if noises < 1 or batch_size < 1:
        raise DimoError(f"noises and batch_size must be at least 1, got {noises} and {batch_size}")
    g = torch.Generator(txt_ids.device).manual_seed(0)
    size = noises, math.prod(latents_shape)
    found = []
    for ids in txt_ids.split(1):
        x_init = torch.randint(path.codebook_size, size, generator=g, device=g.device)
        passes = (
            _last_pass(network, path, ids.expand(len(x), -1), x, latents_shape, times, draft_gain, dense, g)
            for x in x_init.split(batch_size)
        )
        found.append(over_noises(passes, tokens, g))
    return OverNoises(
        torch.stack([one.entropy_of_mean for one in found]),
        torch.stack([one.mean_entropy for one in found]),
        torch.stack([one.codes for one in found]),
    )


def _last_pass(network, path, txt_ids, x_init, latents_shape, times, gain, dense, generator) -> Dense | Chunked:
    *_, x = inputs_of_passes(network, path, txt_ids, x_init, latents_shape, times, gain, dense, generator)
    return predict(network, txt_ids, x, latents_shape, dense)


def beside_teacher(student: OverNoises, teacher: torch.Tensor, path: MetricPath | MixturePath) -> dict[str, float]:
    """The figures of a measurement, as means over prompts and tokens.

    Args:
        student: of P prompts and n noises.
        teacher: its codes in many passes, (P, m, M) with m <= n.

    Returns:
        mutual_information and mean_entropy over all n noises; sampled_entropy and teacher_entropy over m samples, and
        their bound log_m, all in nats per token; spread and teacher_spread, squared distances, over all there are;
        least_share, the smallest over prompts of spread / teacher_spread; distinct and teacher_distinct, the shares of
        distinct videos among m.
    """
    prompts, samples, _ = student.codes.shape if student.codes.dim() == 3 else (0, 0, 0)
    require_shape("teacher", teacher, (prompts, "m", student.codes.shape[-1]))
    m = teacher.shape[1]
    if not 2 <= m <= samples:
        raise DimoError(f"teacher must hold 2 to {samples} samples of a prompt, as many as the student's, got {m}")
    codes, own, teachers = student.codes[:, :m], spread(student.codes, path).mean(1), spread(teacher, path).mean(1)
    return {
        "mutual_information": student.mutual_information.mean().item(),
        "mean_entropy": student.mean_entropy.mean().item(),
        "sampled_entropy": sampled_entropy(codes).mean().item(),
        "teacher_entropy": sampled_entropy(teacher).mean().item(),
        "log_m": math.log(m),
        "spread": own.mean().item(),
        "teacher_spread": teachers.mean().item(),
        "least_share": torch.where(teachers > 0, own / teachers, 1.0).min().item(),
        "distinct": distinct(codes),
        "teacher_distinct": distinct(teacher),
    }


def far_below(value: float, teachers: float) -> bool:
    """Whether a spread or a sampled entropy is below COLLAPSED times the teacher's."""
    return value < COLLAPSED * teachers


def has_collapsed(figures: dict[str, float]) -> bool:
    """Whether one prompt's spread, or the sampled entropy of all, is far below the teacher's (see `beside_teacher`)."""
    return far_below(figures["least_share"], 1.0) or far_below(figures["sampled_entropy"], figures["teacher_entropy"])


def sampled_entropy(codes: torch.Tensor) -> torch.Tensor:
    """Plug-in entropy of every token's code over n samples, codes (P, n, M) -> (P, M) in nats, at most log n.

    It is lower than the entropy of the distribution, the more so the smaller n, so compare it at equal n only.
    """
    require_shape("codes", codes, ("P", "n", "M"))
    same = (codes[:, :, None] == codes[:, None]).sum(2)  # how often each code comes among the n
    return math.log(codes.shape[1]) - same.double().log().mean(1).float()


def spread(codes: torch.Tensor, path: MetricPath | MixturePath) -> torch.Tensor:
    """Mean squared distance of two of the n samples of a prompt in the codebook's space: codes (P, n, M) -> (P, M).

    The codebook's vectors have norm 1, so it is about 2 for unrelated codes. Unlike a count of codes that differ it
    is small where samples differ only by one level of one channel. For a mixture path, whose codebook has no geometry,
    two different codes are at distance 2. Unbiased, whatever n.
    """
    require_shape("codes", codes, ("P", "n", "M"))
    require_ids("codes", codes, path.codebook_size)
    n = codes.shape[1]
    if n < 2:
        raise DimoError(f"a spread needs at least two samples of a prompt, got {n}")
    if isinstance(path, MetricPath):
        vectors = path.codebook[codes]
        return 2 * (vectors - vectors.mean(1, keepdim=True)).square().sum(-1).sum(1) / (n - 1)
    differ = (codes[:, :, None] != codes[:, None]).float().sum((1, 2))
    return 2 * differ / (n * (n - 1))


def distinct(codes: torch.Tensor) -> float:
    """Share of distinct videos among the n of a prompt, codes (P, n, M), averaged over prompts: from 1/n to 1."""
    require_shape("codes", codes, ("P", "n", "M"))
    return sum(len(one.unique(dim=0)) for one in codes) / (codes.shape[0] * codes.shape[1])
