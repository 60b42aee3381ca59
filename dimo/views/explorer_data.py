"""What teacher, auxiliary and student say about one video at one time, per token: the explorer without its pictures.

Passes leave hidden states, not logits: a map goes through the head in chunks of tokens, and a single token costs one
row times the head. Guidance and temperature act behind the passes, so that only prompt, noise and t need new ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from dimo.distill.losses import compare_logits
from dimo.errors import DimoError, nearest, require_ids, require_shape, require_time
from dimo.ursa import MetricPath, MixturePath, predict
from dimo.ursa.chunks import without_compiling
from dimo.views.models import Models
from dimo.views.noise_maps import NETWORK, Pass, noise_maps

TOP = 8  # codes of a token that are shown
TITLES = {
    "conditional": "teacher",
    "unconditional": "teacher, no prompt",
    "guided": "teacher, guided",
    "auxiliary": "auxiliary",
    "student": "student",
    "one_pass": "student at x_init",
}
GUIDED = ("conditional", "unconditional")  # passes behind the guided teacher
OTHERS = ("auxiliary", "student")  # compared with the guided teacher at the same x_t
GAPS = ("kl_from_teacher", "kl_to_teacher", "tv")  # which one comparison gives together


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A number per token: title, unit, the predictions that have it, and what a small one is: 0, or rank 1.

    Those over noises belong to one pass from x_init, whatever seed and t are (`dimo.views.noise_maps`).
    """

    title: str
    unit: str
    of: tuple[str, ...]
    least: float = 0.0
    over_noises: bool = False


STATISTICS = {
    "entropy": Statistic("entropy", "nats", tuple(TITLES)),
    "kl_from_teacher": Statistic("KL(teacher || network)", "nats", OTHERS),
    "kl_to_teacher": Statistic("KL(network || teacher)", "nats", OTHERS),
    "tv": Statistic("total variation to the teacher", "0 to 1", OTHERS),
    "rank": Statistic("rank of x_hat", "1 is the most likely code", tuple(TITLES), 1.0),
    "distance": Statistic("mean distance of a draw to x_hat", "squared, in the codebook", tuple(TITLES)),
    "gradient": Statistic("norm of stage 8's gradient", "nats per logit", ("auxiliary",)),
    "mean_entropy": Statistic("mean H(p): left open", "nats", tuple(NETWORK), over_noises=True),
    "information": Statistic("I(x_hat; noise): decided by the noise", "nats", tuple(NETWORK), over_noises=True),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What can be turned. prompt, seed and t need passes of the networks, the others only the head.

    Attributes:
        prompt: the prompt.
        seed: of the noise x_init, and of the draws of x_hat and x_t; the same numbers are behind x_t at every t.
        t: time of x_t in [0, 1): 0 is noise.
        guidance_scale: of the guided teacher, u + w (c - u); 1 is no guidance.
        temperature: all logits are divided by it; above 0.
    """

    prompt: str
    seed: int = 0
    t: float = 0.5
    guidance_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        require_time("t", self.t)
        if not 0 <= self.seed < 2**63:
            raise DimoError(f"seed must lie in [0, 2**63), got {self.seed}")
        if not 0 < self.temperature < math.inf:
            raise DimoError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.guidance_scale < math.inf:
            raise DimoError(f"guidance_scale must be finite and at least 0 (1 is none), got {self.guidance_scale}")


@dataclasses.dataclass
class Answer:
    """Passes at one (prompt, seed, t): codes (1, N), and predictions by the names of `TITLES`, except "guided"."""

    txt_ids: torch.Tensor
    uncond_ids: torch.Tensor
    x_init: torch.Tensor
    x_hat: torch.Tensor
    x_t: torch.Tensor
    t: float
    passes: dict[str, Pass]

    def names(self) -> list[str]:
        """The predictions that there are, in the order of `TITLES`."""
        return [name for name in TITLES if name in self.passes or name == "guided"]

    def prediction(self, name: str, guidance_scale: float = 1.0, token: int | None = None) -> Pass:
        """A prediction of all tokens (1, N), or of one (1, 1).

        Raises:
            DimoError: there is no such prediction, or no such token.
        """
        if name not in self.names():
            raise DimoError(f"there is no prediction {name!r} here{nearest(name, self.names())}")
        if token is not None and not 0 <= token < self.x_t.shape[1]:
            raise DimoError(f"token must lie in [0, {self.x_t.shape[1]}), got {token}")
        one = slice(None) if token is None else slice(token, token + 1)
        of = {n: p.of_tokens(one) for n, p in self.passes.items() if n in (name, *GUIDED)}
        return of[name] if name != "guided" else of["conditional"].guided(of["unconditional"], guidance_scale)


@torch.no_grad()
def ask(models: Models, prompt: str, seed: int = 0, t: float = 0.5) -> Answer:
    """The passes of stages 2 to 6 for one video: x_init, the student's x_hat, x_t, and all networks at x_t.

    Raises:
        DimoError: t outside [0, 1), or a seed out of range.
    """
    Setting(prompt, seed, t)
    uncond_ids = models.ursa.tokenize([models.negative_prompt], models.max_prompt_length)
    first = one_pass(models, prompt, seed)
    with without_compiling():
        x_t = models.ursa.path.sample(first.x_hat, t, first.generator)
        passes = answers_at(models, first.txt_ids, uncond_ids, x_t, t)
    passes["one_pass"] = first.prediction
    return Answer(first.txt_ids, uncond_ids, first.x_init, first.x_hat, x_t, t, passes)


@dataclasses.dataclass
class OnePass:
    """The student's pass at x_init and its x_hat; codes (1, N). `generator` goes on with the draws of x_t."""

    txt_ids: torch.Tensor
    x_init: torch.Tensor
    prediction: Pass
    x_hat: torch.Tensor
    generator: torch.Generator


@torch.no_grad()
def one_pass(models: Models, prompt: str, seed: int = 0) -> OnePass:
    """Stages 2 and 3 for one video."""
    txt_ids = models.ursa.tokenize([prompt], models.max_prompt_length)
    g, size = torch.Generator(models.device).manual_seed(seed), (1, math.prod(models.grid))
    x_init = torch.randint(models.ursa.path.codebook_size, size, generator=g, device=models.device)
    with without_compiling():  # somebody waits for a few passes
        prediction = predict(models.networks["student"], txt_ids, x_init, models.grid, t=0.0).detach()
        return OnePass(txt_ids, x_init, prediction, prediction.sample(g)[0], g)


@torch.no_grad()
def answers_at(models: Models, txt_ids: torch.Tensor, uncond_ids: torch.Tensor, x_t: torch.Tensor, t: float):
    """{name: prediction} of every network at x_t (1, N). Networks that are one module share one pass."""
    teacher, done = models.networks["teacher"], {}
    passes = {"unconditional": predict(teacher, uncond_ids, x_t, models.grid, t=t).detach()}
    for name, network in models.networks.items():
        if id(network) not in done:
            done[id(network)] = predict(network, txt_ids, x_t, models.grid, t=t).detach()
        passes["conditional" if name == "teacher" else name] = done[id(network)]
    return passes


def offered(models: Models) -> dict[str, list[str]]:
    """{statistic: predictions that have it here}; without a codebook there is no distance, without auxiliary no gap."""
    there = {*GUIDED, "guided", "one_pass", *models.networks} - {"teacher"}
    of = {name: [one for one in TITLES if one in s.of and one in there] for name, s in STATISTICS.items()}
    if not isinstance(models.ursa.path, MetricPath):
        del of["distance"]
    return {name: those for name, those in of.items() if those}


@torch.no_grad()
def token_maps(models: Models, answer: Answer, setting: Setting, statistic: str, name: str) -> dict[str, torch.Tensor]:
    """A statistic of a prediction for every token, {statistic: (T, H, W) float32 on the CPU}.

    Of those over noises, which need new passes, both, and of GAPS all. Differences to the teacher are those to the
    guided teacher at `setting.guidance_scale`, as in training; the gradient is that of D_beta with the run's beta, with
    respect to the auxiliary's logits (arXiv 2503.15457, eq. 8-10).

    Raises:
        DimoError: an unknown statistic, or one that this prediction does not have.
    """
    known = offered(models)
    if statistic not in known:
        raise DimoError(f"statistic {statistic!r} is not one of those here{nearest(statistic, known)}")
    if name not in known[statistic]:
        raise DimoError(f"{statistic} is not defined for {name!r}{nearest(name, known[statistic])}")
    if STATISTICS[statistic].over_noises:
        both = noise_maps(models, answer.txt_ids, name, setting.temperature)
        return {one: values.view(models.grid).cpu() for one, values in both.items()}
    predictions = [answer.prediction(name, setting.guidance_scale)]
    if statistic in ("entropy", "rank"):
        function: Callable = _entropy if statistic == "entropy" else _rank
    elif statistic == "distance":
        function = _Distance(models.ursa.path)
    else:
        predictions = [answer.prediction("guided", setting.guidance_scale), *predictions]
        function = _gaps if statistic in GAPS else _Gradient(setting.t if models.beta == "time" else float(models.beta))
    values = in_chunks(function, predictions, answer.x_hat, setting.temperature)
    made = dict(zip(GAPS, values.unbind(-1))) if statistic in GAPS else {statistic: values}
    return {one: values.view(models.grid).cpu() for one, values in made.items()}


def in_chunks(
    function: Callable, predictions: Sequence[Pass], x: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """function(logits (n, K) of each prediction, x (n,)) -> (n, ...) for all tokens, in chunks: (B, N, ...) float32."""
    require_shape("x", x, predictions[0].shape)
    require_ids("x", x, predictions[0].codebook_size)
    fixed, flat = [p.detach() for p in predictions], x.flatten()
    parts = [
        function(*(p.logits(rows) / temperature for p in fixed), flat[rows]) for rows in predictions[0].row_chunks()
    ]
    return torch.cat(parts).float().unflatten(0, x.shape)


def _entropy(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _rank(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (z > z.gather(-1, x[:, None])).sum(-1) + 1


class _Distance:
    """E |e_y - e_x|^2 over y ~ p, by the mean and the mean square of the codebook's vectors e."""

    def __init__(self, path: MetricPath | MixturePath):
        assert isinstance(path, MetricPath)
        self.codebook, self.square = path.codebook, path.codebook.square().sum(-1)

    def __call__(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p = z.softmax(-1)
        cross = ((p @ self.codebook) * self.codebook[x]).sum(-1)
        return (p @ self.square + self.square[x] - 2 * cross).clamp(min=0)


def _gaps(z_teacher: torch.Tensor, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """GAPS, (n, 3)."""
    return compare_logits(z_teacher, z, x, None, torch.float32)[1][: len(GAPS)].T.clamp(min=0)


class _Gradient:
    """The norm of stage 8's gradient."""

    def __init__(self, beta: float):
        self.beta = beta

    def __call__(self, z_teacher: torch.Tensor, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        beta = torch.full((len(z),), self.beta, device=z.device)
        return compare_logits(z_teacher, z, x, beta, torch.float32)[0].norm(dim=-1)


@dataclasses.dataclass
class Top:
    """What one prediction says about tokens: (n, k) codes and log-probabilities in nats, the most likely first; and per
    token (n,) the entropy in nats, and the rank and log-probability of x_hat."""

    codes: torch.Tensor
    log_p: torch.Tensor
    entropy: torch.Tensor
    rank: torch.Tensor
    log_p_x_hat: torch.Tensor


@torch.no_grad()
def top_codes(answer: Answer, setting: Setting, token: int | None = None, k: int = TOP) -> dict[str, Top]:
    """The k most likely codes of every prediction: of one token, by one row times the head, or of all, in chunks.

    Returns:
        {name: Top}, in the order of `TITLES`; k is at most the codebook's size.

    Raises:
        DimoError: a token out of range.
    """
    x = answer.x_hat.flatten()
    found = {}
    for name in answer.names():
        prediction = answer.prediction(name, setting.guidance_scale, token).detach()
        own, size = x if token is None else x[token : token + 1], min(k, prediction.codebook_size)
        parts = [
            _top(prediction.logits(rows) / setting.temperature, own[rows], size) for rows in prediction.row_chunks()
        ]
        found[name] = Top(*(torch.cat(part).cpu() for part in zip(*parts)))
    return found


def _top(z: torch.Tensor, x: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    log_p = z.log_softmax(-1)
    best, codes = log_p.topk(k, -1)
    return codes, best, -(log_p.exp() * log_p).sum(-1), _rank(z, x), log_p.gather(-1, x[:, None])[:, 0]


def token_at(grid: tuple[int, int, int], place: tuple[int, int, int]) -> int:
    """Index of the token at (frame, row, column).

    Raises:
        DimoError: it lies outside the grid.
    """
    if len(place) != 3 or not all(0 <= p < n for p, n in zip(place, grid)):
        raise DimoError(f"token must lie in latents_shape {tuple(grid)} as (frame, row, column), got {tuple(place)}")
    return (place[0] * grid[1] + place[1]) * grid[2] + place[2]
