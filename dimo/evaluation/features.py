"""Two sets of videos compared in the teacher's hidden features: Fréchet distance and coverage.

Both depend on the number of videos, so a value means something only beside the floor: the teacher against the teacher
from other noise, at the same number.
"""

from __future__ import annotations

import torch

from dimo.errors import DimoError, require_shape
from dimo.evaluation.bootstrap import Estimate, jackknife

DIMENSION = 32  # of the projected features at most; a covariance needs two videos for each dimension
# Videos below which there is no Fréchet distance. Of Gaussian features, two sets of one sampler are as far apart by
# chance as videos that are all the teacher's mean: in over half of the cases at 4, in 5% at 12, in fewer than 1% at 16.
FEWEST = 16
NEIGHBOURS = 5


def dimension(videos: int, features: int) -> int:
    """Dimension in which the Fréchet distance of sets of n videos with D features is measured; 0: there is none."""
    return min(DIMENSION, features, videos // 2) if videos >= FEWEST else 0


def project(features: torch.Tensor, size: int) -> torch.Tensor:
    """Features (..., D) on `size` <= D random orthonormal directions, the same in every call: (..., size) float64.

    Distances between two sets are then those of a random subspace, and on average size / D of the whole.
    """
    d = features.shape[-1]
    if not 1 <= size <= d:
        raise DimoError(f"size must be from 1 to the {d} features, got {size}")
    g = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(d, size, generator=g, dtype=torch.float64))
    return features.double() @ directions


def frechet_distance(
    mean_1: torch.Tensor, covariance_1: torch.Tensor, mean_2: torch.Tensor, covariance_2: torch.Tensor
) -> torch.Tensor:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2), of two Gaussians (Dowson and Landau, 1982).

    Args:
        mean_1, mean_2: (..., D).
        covariance_1, covariance_2: (..., D, D), symmetric and positive semi-definite.

    Returns:
        (...) float64, the squared distance that is known as FID, at least 0.
    """
    require_shape("covariance_1", covariance_1, (*mean_1.shape, mean_1.shape[-1]))
    require_shape("mean_2", mean_2, tuple(mean_1.shape))
    require_shape("covariance_2", covariance_2, tuple(covariance_1.shape))
    first, second = covariance_1.double(), covariance_2.double()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    inner = root @ second @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    traces = first.diagonal(dim1=-2, dim2=-1).sum(-1) + second.diagonal(dim1=-2, dim2=-1).sum(-1)
    apart = (mean_1.double() - mean_2.double()).square().sum(-1)
    return (apart + traces - 2 * cross).clamp(min=0)


def frechet(one: torch.Tensor, other: torch.Tensor) -> Estimate | None:
    """Fréchet distance of features (P, V, D) from those of the teacher, (P, V', D), of the same P prompts.

    Every feature is divided by its standard deviation over the teacher's videos, since a few large ones would decide
    alone, and all are projected to `dimension`. None where there are fewer than FEWEST videos, or where features are
    not finite.
    """
    require_shape("one", one, ("P", "V", "D"))
    require_shape("other", other, (one.shape[0], "V'", one.shape[2]))
    videos = min(one[..., 0].numel(), other[..., 0].numel())
    size = dimension(videos, one.shape[2])
    finite = bool(one.isfinite().all() and other.isfinite().all())
    if not size or not finite:
        return None
    middle, scale = other.double().mean((0, 1)), other.double().flatten(0, 1).std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    sets = [_moments(project((features.double() - middle) / scale, size)) for features in (one, other)]

    def distance(w: torch.Tensor) -> torch.Tensor:
        gaussians = []
        for mean, square, count in sets:
            m = w @ mean
            c = (w @ square.flatten(1)).unflatten(1, (size, size)) - m[:, :, None] * m[:, None]
            gaussians += [m, c * count / (count - 1)]
        return frechet_distance(*gaussians)

    return jackknife(distance, len(one))


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and second moment of each prompt's features (P, V, D), and the number of videos P V."""
    return features.mean(1), features.mT @ features / features.shape[1], features[..., 0].numel()


def is_covered(one: torch.Tensor, other: torch.Tensor, neighbours: int = NEIGHBOURS) -> torch.Tensor:
    """Which of the videos `other` have one of `one` no farther away than their own k-th nearest neighbour.

    The mean is "coverage" of Naeem et al. (arXiv 2002.09797, eq. 6). For two large sets of one distribution, of equal
    size, it is about 1 - 2^-k: .97 for k = 5.

    Args:
        one: (n, D) features.
        other: (m, D), of the distribution to be covered; its own videos do not count as their neighbours.
        neighbours: k, at least 1 and less than m.

    Returns:
        (m,) bool.
    """
    require_shape("one", one, ("n", "D"))
    require_shape("other", other, ("m", one.shape[1]))
    if not 1 <= neighbours < len(other):
        raise DimoError(f"neighbours must be from 1 to {len(other) - 1}, one less than there are videos: {neighbours}")
    one, other = one.double(), other.double()
    apart = torch.cdist(other, other, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(float("inf"))
    radius = apart.kthvalue(neighbours, 1).values
    nearest = torch.cdist(other, one, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return nearest <= radius
