"""How far a metric can be trusted: its rank correlation with an oracle's figure, over students good and bad.

`scripts/trust.py` measures it on worlds with an oracle and writes trust.json, which reports quote.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from dimo.errors import DimoError, require_shape

FILE = Path(__file__).with_name("trust.json")
WEAK = 0.8  # a correlation below it
RESAMPLES = 2000
# The figure of the oracle that each metric stands in for where there is none. Chosen beforehand, but for right_prompt:
# adherence, which was tried first, counts ties in favour, and calls the plain videos of a collapsed student right. And
# but for BOTH, in which right_prompt was a factor, too: features that do not know the prompt cannot tell a wrong one.
BOTH = "token_accuracy x coverage"
STANDS_FOR = (
    dict.fromkeys(("token_entropy", "teacher_nll", "nll_difference", "recovered"), "token_accuracy")
    | dict.fromkeys(("guided_nll", "guided_nll_difference", "motion", "flicker", "sharpness"), "token_accuracy")
    | dict.fromkeys(("pixel_motion", "pixel_flicker", "pixel_sharpness"), "token_accuracy")
    | dict.fromkeys(("prompt_gain", "retrieval"), "right_prompt")
    | dict.fromkeys(("spread", "spread_ratio", "distinct", "diversity", "codes_used"), "coverage")
    | dict.fromkeys(("frechet", "feature_coverage"), BOTH)
)


def goodness(better: str | None, value: float) -> float:
    """A metric's value as a number that is high where it is good; `better` is that of `Metric`."""
    if better == "higher":
        return value
    if better == "lower":
        return -value
    if better and better.startswith("nearer to "):
        return -abs(value - float(better.removeprefix("nearer to ")))
    raise DimoError(f"better must be higher, lower or nearer to a number, got {better!r}")


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of values (n,), from 1; equal ones share their mean rank. float64."""
    require_shape("values", values, ("n",))
    below, same = values[:, None] > values, values[:, None] == values
    return below.double().sum(1) + (same.double().sum(1) + 1) / 2


def spearman(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Spearman's rank correlation of values (n,); None where one of them does not vary."""
    require_shape("other", other, tuple(one.shape))
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    scale = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a @ b).item() / scale if scale > 0 else None


def correlation(one: Sequence[float], other: Sequence[float], families: Sequence[str]) -> dict | None:
    """`spearman` of two figures of n students, with a 95% interval by the bootstrap's percentiles.

    Students of one family, such as the checkpoints of a run, are alike. So families are what is drawn again, each with
    all of its students.

    Returns:
        {"rho", "interval": [low, high], "students": n}, or None where it is undefined.
    """
    if not len(one) == len(other) == len(families):
        raise DimoError(
            f"one, other and families must be of one length, got {len(one)}, {len(other)} and {len(families)}"
        )
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
    rho = spearman(a, b)
    if rho is None:
        return None
    names = sorted(set(families))
    of_family = torch.tensor([names.index(family) for family in families])
    drawn = torch.randint(len(names), (RESAMPLES, len(names)), generator=torch.Generator().manual_seed(0))
    times = (drawn[:, :, None] == torch.arange(len(names))).sum(1)  # that each family is drawn
    again = _spearman_of_resamples(a, b, times[:, of_family].double())
    if not len(again):
        return None
    low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"rho": rho, "interval": [low, high], "students": len(one)}


def _spearman_of_resamples(one: torch.Tensor, other: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """`spearman` of values (n,) in every resample that has them `times` (R, n); without those where one is constant."""
    count = times.sum(1, keepdim=True)

    def centred(values: torch.Tensor) -> torch.Tensor:
        below, same = ((values[:, None] > values).double(), (values[:, None] == values).double())
        return times @ (below + same / 2).T - count / 2  # ranks, but for what is the same for all

    a, b = centred(one), centred(other)
    scale = ((times * a.square()).sum(1) * (times * b.square()).sum(1)).sqrt()
    return ((times * a * b).sum(1) / scale)[scale > 0]


@functools.cache
def worlds() -> dict[str, dict]:
    """What was measured of each world, {title: {"command", "students", "families", "metrics"}}."""
    return json.loads(FILE.read_text(encoding="utf-8"))["worlds"]


def measured(metric: str, world: str | None) -> dict[str, dict]:
    """What was measured of a metric in `world`, or in all worlds if that is not among them.

    Args:
        world: its `title_of`; None: there is no oracle.

    Returns:
        {title of the world: {"oracle", "rho", "interval", "students", "healthy"}}.
    """
    known = worlds()
    some = {world: known[world]} if world in known else known
    return {title: about["metrics"][metric] for title, about in some.items() if metric in about["metrics"]}


def is_weak(metric: str, world: str | None) -> bool:
    """Whether a metric's correlation is below WEAK in `world`, or in any where it was not measured there."""
    return any(round(row["rho"], 2) < WEAK for row in measured(metric, world).values())


def sentence(metric: str, world: str | None) -> str:
    """How far a metric can be trusted, in a sentence; empty where that was not measured."""
    said = []
    for title, row in measured(metric, world).items():
        low, high = row["interval"]
        with_what = f"with {row['oracle']} over {row['students']} students of {title}"
        healthy = f", {row['healthy']['rho']:.2f} among those not collapsed" if row["healthy"] else ""
        said.append(f"{row['rho']:.2f} [{low:.2f}, {high:.2f}] {with_what}{healthy}")
    weak = ": weak" if is_weak(metric, world) else ""
    return f"Its rank correlation with the oracle was {'; '.join(said)}{weak}." if said else ""


def rests_on(world: str | None) -> str:
    """A sentence on the students of which `sentence` speaks."""
    if world in worlds():
        return f"Rank correlations: measured on students of this world, {world}."
    return f"Rank correlations: measured on students of {' and '.join(worlds())}, not of the teacher of this report."


def weak_ones(metrics: Iterable[str], world: str | None) -> str:
    """A sentence that names those of some metrics that are weak; empty if none is."""
    weak = [name for name in metrics if is_weak(name, world)]
    on = world if world in worlds() else " or ".join(worlds())
    return f"Weak, by a rank correlation below {WEAK} with the oracle of {on}: {', '.join(weak)}." if weak else ""
