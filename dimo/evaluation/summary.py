"""What a report says in a few lines that fit into a terminal of 80 to 100 columns."""

from __future__ import annotations

from pathlib import Path

from dimo.errors import DimoError
from dimo.evaluation.comparison import AGAIN
from dimo.evaluation.evaluate import student_row
from dimo.ursa.weights import read_json

# the metrics that decide, with an oracle and without; all others are in report.json and report.html
ORACLE = {
    "validity": "share of videos that are exactly one that the world can make",
    "adherence": "share of videos that are nearest to one of their own prompt",
    "coverage": "how evenly valid videos use what their prompt leaves open; best 1",
}
READ = {"read": "share of videos in whose frames a reader sees their prompt"}  # in worlds that have one
JUDGE = {
    "recovered": "share of tokens that the teacher would draw again as they were; best the teacher's",
    "retrieval": "share of videos that fit their own prompt better than others; best the teacher's",
    "feature_coverage": "share of the teacher's videos that have one of these near them; best the last row's",
    "spread_ratio": "how far the videos of a prompt differ, relative to the teacher's; best 1, near 0 a collapse",
}
CODES = {
    "spread": "how far the videos of a prompt differ; near 0 a collapse",
    "distinct": "share of different videos among those of a prompt",
}
KINDS = {"student": "student", "untrained": "what it started from", "teacher": "teacher"}


def read_report(file: Path) -> dict[str, dict]:
    """The rows of a report.json.

    Raises:
        DimoError: it is damaged, or that of a run of a grid which diverged.
    """
    rows = read_json(file)
    if "diverged" in rows:
        raise DimoError(f"the run diverged: {rows['diverged']}")
    if "student_1" not in rows or not all(isinstance(row, dict) for row in rows.values()):
        raise DimoError(f"{file} is not what `dimo evaluate` writes, which makes it again")
    return rows


def format_summary(rows: dict[str, dict]) -> str:
    """The metrics that decide as a table, a row for each sampler, and what they mean.

    Args:
        rows: a report, as `evaluate_to_folder` returns it.
    """
    student = rows[student_row(rows)]
    columns = next(some for some in (ORACLE, JUDGE, CODES) if some is CODES or some.keys() <= student.keys())
    shown = {title_of(name): row for name, row in rows.items() if not name.endswith("argmax")}
    if columns is ORACLE:
        columns = ORACLE | (READ if READ.keys() <= student.keys() else {})
        shown.pop(next((title_of(name) for name in rows if name.endswith(AGAIN)), ""), None)
    first = max(map(len, shown))
    lines = [" " * first + "".join(f"  {name:>9}" for name in columns)]
    for title, row in shown.items():
        cells = (f"  {_number(row.get(name)):>{max(9, len(name))}}" for name in columns)
        lines.append(f"{title:{first}}{''.join(cells)}")
    lines += ["", *(f"{name}: {meaning}" for name, meaning in columns.items())]
    return "\n".join(lines)


def prompts_of(rows: dict) -> str:
    """A sentence on the prompts of a report; empty for a world, where all prompts are used."""
    row = rows["student_1"]
    if "prompts_held_out" not in row:
        return ""
    held_out, known = row["prompts_held_out"], row.get("prompts_trained_on")
    if held_out is None:
        return "Prompts: captions other than the run's; it is not known which of them it was trained on."
    if not held_out:
        return "Prompts: captions that were trained on."
    of = "caption" if held_out == 1 else "captions"
    return f"Prompts: {held_out} held-out {of}{f', and {known} that were trained on' if known else ''}."


def teachers_of(rows: dict) -> str:
    """A sentence if the report's teacher is not the one that the student was distilled from, else empty."""
    row = rows["student_1"]
    if "distilled_from" not in row:
        return ""
    return f"Teacher: {row['teacher']}, but the student was distilled from another one, {row['distilled_from']}."


def title_of(row: str) -> str:
    """The name of a report's row in words: student_1 is "student, 1 pass"."""
    kind, steps = row.removesuffix(AGAIN).split("_")[:2]
    title = f"{KINDS[kind]}, {steps} {'pass' if steps == '1' else 'passes'}"
    return f"{title}, other noise" if row.endswith(AGAIN) else title


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
