"""The two probability paths of URSA: from uniform noise at t = 0 to a data token at t = 1.

Metric path (kinetic-optimal discrete flow matching, arXiv 2412.03487, used by URSA):
    p_t(x | x_1) = softmax_x(-beta_t d(x, x_1)),   beta_t = c (t / (1 - t))^alpha,
with d the squared distance of L2-normalised codebook vectors. Mixture path: keep x_1 with probability t, else uniform.

Codebooks have up to 131,072 codes and videos 33,280 tokens, so only `prob` and `velocity` build a tensor (B, N, K) for
all tokens; `sample` and `jump` process tokens in chunks.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, may_read, require_ids, require_shape, require_time
from dimo.ursa.chunks import BLOCK, FEW_CODES, chunks, inverse_cdf, on_device, pick, pick_in_blocks, tokens_at_once
from dimo.ursa.normaliser import LogNormaliser, interpolate

FEW_DIMENSIONS = 8  # of code vectors, whose distances cost less than reading them from memory
T_PER = ("sample", "frame", "mixed")  # what has a t of its own: a video, each of its latent frames, or by a coin either
T_MAX = 0.999  # of all draws of t, and of `log_likelihood`: beta_t is infinite at 1


def categorical(prob: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one index per row of prob (..., K), which need not be normalised -> (...) int64.

    Inverts the CDF at one float64 uniform number per row. `torch.multinomial` draws a number per entry, which at 64,000
    codes would take half of a training step on a CPU.
    """
    return inverse_cdf(prob, torch.rand(prob.shape[:-1], generator=generator, device=prob.device, dtype=torch.float64))


def time_like(t: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """Expand t, which is a number, (B,) or of x's shape (B, ...), to a float32 tensor of x's shape."""
    require_time("t", t)
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
    if t.dim() == 1 and t.shape[0] == x.shape[0]:
        t = t.view(-1, *[1] * (x.dim() - 1))
    elif t.dim() != 0 and t.shape != x.shape:
        raise DimoError(f"t must be a number or have shape ({x.shape[0]},) or {tuple(x.shape)}, got {tuple(t.shape)}")
    return t.expand(x.shape)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = t / (t + s (1 - t)): times t in [0, 1) moved towards the noise (t = 0) for s > 1, to the data for s < 1.

    The shift of flow models, and of URSA's sampler (`dimo.ursa.sampler.timesteps`).
    """
    if not shift > 0:
        raise DimoError(f"shift must be positive (1: off), got {shift}")
    return t if shift == 1 else t / (t + shift * (1 - t))


class _Path:
    """Common to both paths: validation, chunking, and the jump of a sampling step."""

    moves_at_0 = True  # whether a jump that starts at t = 0 moves any token

    def __init__(self, codebook: torch.Tensor):
        require_shape("codebook", codebook, ("K", "D"))
        self.codebook_size = codebook.shape[0]
        self.device = codebook.device

    def _prob(self, x_1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`prob` for codes that have been checked, and t of x_1's shape."""
        raise NotImplementedError

    def _velocity(self, x_1: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
        """`velocity` for codes that have been checked."""
        raise NotImplementedError

    def prob(self, x_1: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """p_t(. | x_1): x_1 (B, ...) in [0, K); t a number, (B,) or x_1's shape -> (B, ..., K), rows sum to 1."""
        require_ids("x_1", x_1, self.codebook_size)
        return self._prob(x_1, time_like(t, x_1))

    def sample(self, x_1: torch.Tensor, t: torch.Tensor | float, generator: torch.Generator | None = None):
        """Draw x_t ~ p_t(. | x_1), of x_1's shape; arguments as in `prob`. Independent of the chunk size."""
        require_ids("x_1", x_1, self.codebook_size)
        t = time_like(t, x_1)
        u = torch.rand(x_1.numel(), generator=generator, device=x_1.device, dtype=torch.float64)
        parts = chunks(tokens_at_once(self.codebook_size, x_1.device), x_1.flatten(), t.flatten(), u)
        return torch.cat([self._draw(*part) for part in parts]).view(x_1.shape)

    def _draw(self, x_1: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return inverse_cdf(self._prob(x_1, t), u)

    def _log_likelihood(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`log_likelihood` of codes and times that have been checked."""
        raise NotImplementedError

    def log_likelihood(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log p_t(x_t | x_1), in nats, of every clean code x_1: x_t (n,) in [0, K), t (n,) in [0, 0.999] -> (n, K).

        Of Bayes' rule for one token; the rows of `prob` are normalised over x_t, these are not normalised over x_1.
        """
        require_shape("x_t", x_t, ("n",))
        require_shape("t", t, tuple(x_t.shape))
        require_ids("x_t", x_t, self.codebook_size)
        require_time("t", t)
        if may_read(t) and not bool((t < T_MAX + 1e-6).all()):
            raise DimoError(f"t must be at most {T_MAX}, got {t.max().item():.6g}")
        return self._log_likelihood(x_t, t.float())

    def velocity(self, x_1: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
        """Jump rates (B, ..., K) from x_t to every code, given predicted clean tokens x_1, both (B, ...)."""
        require_shape("x_t", x_t, tuple(x_1.shape))
        require_ids("x_1", x_1, self.codebook_size)
        require_ids("x_t", x_t, self.codebook_size)
        require_time("t", t)
        return self._velocity(x_1, x_t, float(t))

    def jump(self, x_1: torch.Tensor, x_t: torch.Tensor, t: float, dt: float, generator=None) -> torch.Tensor:
        """One sampling step from t to t + dt: each token jumps with probability 1 - exp(-dt * its total rate).

        Args:
            x_1: (B, ...) predicted clean tokens.
            x_t: (B, ...) current tokens.
            t, dt: time in [0, 1) and step size.

        Returns:
            Tokens of x_t's shape; a token that jumps gets a code with probability proportional to its rate. The result
            does not depend on the chunk size.
        """
        out, n, device = [], x_1.numel(), x_1.device
        whether = torch.rand(n, generator=generator, device=device)
        where = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        size = tokens_at_once(self.codebook_size, device)
        for one, now, u, v in chunks(size, x_1.flatten(), x_t.flatten(), whether, where):
            rate = self._velocity(one, now, t).scatter(-1, now[:, None], 0)
            jumps = u < -torch.expm1(-dt * rate.sum(-1))
            out.append(torch.where(jumps, inverse_cdf(rate, v), now))
        return torch.cat(out).view(x_t.shape)


def _products(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """x codebook^T in float32 even under bf16 autocast, since beta_t amplifies rounding errors by hundreds."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ codebook.T


def _draw_near(
    x_1: torch.Tensor, codebook: torch.Tensor, square: torch.Tensor, beta: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Draw from softmax_x(-beta |x_1 - x|^2) for vectors x_1 (n, D), beta (n,), u (n,); the term |x_1|^2 cancels."""
    return pick(beta.unsqueeze(-1) * (2 * _products(x_1, codebook) - square), u)


def _draw_blockwise(x_1: torch.Tensor, codebook: torch.Tensor, beta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """`_draw_near` for vectors of few dimensions, to be compiled: nothing of size (n, K) is kept in memory.

    The largest logit is known, 0 at x_1 itself, so a first pass adds up the blocks of `pick` and a second one looks
    into the block that u falls into. Each pass computes its distances anew, from a few numbers of cache.
    """
    whole = len(codebook) // BLOCK
    mass = _weights(x_1[:, None, None], codebook.view(whole, BLOCK, -1), beta[:, None, None]).sum(-1)
    return pick_in_blocks(
        mass, lambda block: _weights(x_1[:, None], codebook.view(whole, BLOCK, -1)[block], beta[:, None]), u
    )


def _weights(x: torch.Tensor, y: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """exp(-beta |x - y|^2) of vectors (..., D), dimension by dimension: compilers fuse it, unlike a product."""
    distance = sum((x[..., i] - y[..., i]).square() for i in range(x.shape[-1]))
    return (-beta * distance).exp()


def _log_likelihood_near(
    x_t: torch.Tensor, codebook: torch.Tensor, square: torch.Tensor, beta: torch.Tensor, *normaliser: torch.Tensor
) -> torch.Tensor:
    """-beta |x_t - x_1|^2 - log Z of every code x_1, for vectors x_t (n, D), beta (n,), and `interpolate`'s inputs."""
    distance = x_t.square().sum(-1, keepdim=True) + square - 2 * _products(x_t, codebook)
    return -beta.unsqueeze(-1) * distance - interpolate(*normaliser)


class MixturePath(_Path):
    """x_t is x_1 with probability t, else uniform over the K codes; the vectors of `codebook` (K, D) are unused."""

    def _prob(self, x_1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        uniform = ((1 - t) / self.codebook_size).unsqueeze(-1)
        return uniform + t.unsqueeze(-1) * F.one_hot(x_1, self.codebook_size)

    def _log_likelihood(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self._prob(x_t, t).log()  # symmetric in x_t and x_1

    def _velocity(self, x_1: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
        return F.one_hot(x_1, self.codebook_size) * torch.tensor(1 / (1 - t), device=x_1.device)


class MetricPath(_Path):
    """p_t(x | x_1) = softmax_x(-c (t/(1-t))^alpha d(x, x_1)).

    Args:
        codebook: (K, D) code vectors, L2-normalised here.
        alpha, c: positive constants of beta_t, from the checkpoint's scheduler_config.json.
        eps: lower bound of the norm in the normalisation.
    """

    moves_at_0 = False  # as upstream: see `_velocity`

    def __init__(self, codebook: torch.Tensor, alpha: float, c: float, eps: float = 1e-5):
        super().__init__(codebook)
        if not (alpha > 0 and c > 0):
            raise DimoError(f"alpha and c must be positive, got alpha={alpha}, c={c}")
        self.alpha, self.c, self.eps = float(alpha), float(c), float(eps)
        self.codebook = F.normalize(codebook.float(), dim=-1, eps=eps)
        self._square = self.codebook.square().sum(-1)
        self._table: torch.Tensor | None = None
        self._normaliser: LogNormaliser | None = None  # made when it is first needed
        if self.codebook_size <= FEW_CODES:  # small enough to precompute the K x K distances
            self._table = self._distance(torch.arange(self.codebook_size, device=self.device))

    def _distance(self, x_1: torch.Tensor) -> torch.Tensor:
        """d(x_1, .): (...) -> (..., K)."""
        if self._table is not None:
            return self._table[x_1]
        return self._square[x_1].unsqueeze(-1) + self._square - 2 * _products(self.codebook[x_1], self.codebook)

    def _prob(self, x_1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        beta = self.c * (t / (1 - t)) ** self.alpha
        return (-beta.unsqueeze(-1) * self._distance(x_1)).softmax(-1)

    def _draw(self, x_1: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        compiles = u.is_cuda and self.codebook_size > BLOCK  # then distances cost less than sums of all probabilities
        if self._table is not None and not compiles:
            return super()._draw(x_1, t, u)
        beta = self.c * (t / (1 - t)) ** self.alpha
        if u.is_cuda and self.codebook_size % BLOCK == 0 and self.codebook.shape[1] <= FEW_DIMENSIONS:
            return on_device(_draw_blockwise, u)(self.codebook[x_1], self.codebook, beta, u)
        return on_device(_draw_near, u)(self.codebook[x_1], self.codebook, self._square, beta, u)

    def _log_likelihood(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self._normaliser is None:
            most = self.c * (T_MAX / (1 - T_MAX)) ** self.alpha
            self._normaliser = LogNormaliser(self._distance, self.codebook_size, self.codebook_size, most, self.device)
        beta, z = self.c * (t / (1 - t)) ** self.alpha, self._normaliser
        one = on_device(_log_likelihood_near, t)
        return one(self.codebook[x_t], self.codebook, self._square, beta, *z.weights(beta), z.values, z.slopes)

    def _velocity(self, x_1: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
        # d(beta_t)/dt; 0 at t = 0 as upstream, where the derivative is infinite for alpha < 1
        slope = self.c * self.alpha * t ** (self.alpha - 1) / (1 - t) ** (self.alpha + 1) if t > 0 else 0.0
        distance = self._distance(x_1)
        here = (self.codebook[x_t] - self.codebook[x_1]).square().sum(-1, keepdim=True)
        prob = self._prob(x_1, torch.full(x_1.shape, t, dtype=torch.float32, device=x_1.device))
        return prob * slope * (here - distance).relu()
