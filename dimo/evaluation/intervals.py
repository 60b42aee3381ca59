"""Means over seeds with 95% intervals, and the tables of a grid."""

from __future__ import annotations

import math
import statistics

COLUMNS = ("validity", "adherence", "coverage", "coverage_near", "token_accuracy", "coverage_of_teacher")
# 97.5% quantiles of Student's t with 1 to 10 degrees of freedom
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z = 1.959964  # of the normal distribution


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by Cornish and Fisher's expansion from 11 degrees of freedom on."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    terms = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95% t-interval) of at least one value; infinite for one."""
    n = len(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return statistics.mean(values), half


def cell(values: list[float | None]) -> str:
    """`mean +- half width (n)` of the values that are defined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "undefined" if values else "-"
    mean, half = interval(defined)
    shown = f"{mean:.3f} +- {half:.3f}" if math.isfinite(half) else f"{mean:.3f}"
    return f"{shown} ({len(defined)}{f' of {len(values)}' if len(defined) < len(values) else ''})"


def format_grid(result: dict) -> str:
    """The results of `dimo.evaluation.ablate` as a markdown table, world by world.

    Args:
        result: {world: {arm: {"rate", "starred", "tuning", "seeds": [metrics of a run, or {"diverged": why}]}}}.
    """
    lines = []
    for world, arms in result.items():
        head = ["arm", "lr", *COLUMNS]
        lines += [f"**{world}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for arm, row in arms.items():
            rate = "-" if row["rate"] is None else f"{row['rate']:g}{'*' * row['starred']}"
            kept = [seed for seed in row["seeds"] if "diverged" not in seed]
            cells = [cell([seed.get(column) for seed in kept]) for column in COLUMNS]
            lost = len(row["seeds"]) - len(kept)
            name = f"{arm} ({lost} diverged)" if lost else arm
            lines.append(f"| {' | '.join([name, rate, *cells])} |")
        lines.append("")
    return "\n".join(lines)
