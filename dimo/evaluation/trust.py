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
# The figure of the oracle that each metric stands in for where there is none, chosen before anything was measured.
ALL = "all three"  # their product
STANDS_FOR = (
    dict.fromkeys(("token_entropy", "teacher_nll", "nll_difference"), "token_accuracy")
    | dict.fromkeys(("guided_nll", "guided_nll_difference", "motion", "flicker", "sharpness"), "token_accuracy")
    | dict.fromkeys(("pixel_motion", "pixel_flicker", "pixel_sharpness"), "token_accuracy")
    | dict.fromkeys(("prompt_gain", "retrieval"), "right_prompt")
    | dict.fromkeys(("spread", "spread_ratio", "distinct", "diversity", "codes_used"), "coverage")
    | dict.fromkeys(("frechet", "feature_coverage"), ALL)
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
    members = [torch.tensor([i for i, family in enumerate(families) if family == name]) for name in names]
    drawn = torch.randint(len(names), (RESAMPLES, len(names)), generator=torch.Generator().manual_seed(0))
    again = []
    for some in drawn.tolist():
        index = torch.cat([members[i] for i in some])
        found = spearman(a[index], b[index])
        if found is not None:
            again.append(found)
    if not again:
        return None
    low, high = torch.tensor(again).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"rho": rho, "interval": [low, high], "students": len(one)}


@functools.cache
def measured() -> dict[str, dict[str, dict]]:
    """What was measured, {metric: {world: {"oracle", "rho", "interval", "students", "healthy"}}}."""
    worlds = json.loads(FILE.read_text(encoding="utf-8"))["worlds"]
    found: dict[str, dict[str, dict]] = {}
    for world, about in worlds.items():
        for name, row in about["metrics"].items():
            found.setdefault(name, {})[world] = row
    return found


def is_weak(metric: str) -> bool:
    """Whether a metric's correlation was measured, and is below WEAK in some world."""
    return any(row["rho"] < WEAK for row in measured().get(metric, {}).values())


def sentence(metric: str) -> str:
    """How far a metric can be trusted, in a sentence; empty where that was not measured."""
    said = []
    for world, row in measured().get(metric, {}).items():
        low, high = row["interval"]
        with_what = f"with {row['oracle']} over {row['students']} students of {world}"
        healthy = f", {row['healthy']['rho']:.2f} among those not collapsed" if row["healthy"] else ""
        said.append(f"{row['rho']:.2f} [{low:.2f}, {high:.2f}] {with_what}{healthy}")
    weak = ": weak" if is_weak(metric) else ""
    return f"Its rank correlation with the oracle was {'; '.join(said)}{weak}." if said else ""


def weak_ones(metrics: Iterable[str]) -> str:
    """A sentence that names those of some metrics that are weak; empty if none is."""
    weak = [name for name in metrics if is_weak(name)]
    return f"Weak, by a rank correlation below {WEAK} with an oracle: {', '.join(weak)}." if weak else ""
