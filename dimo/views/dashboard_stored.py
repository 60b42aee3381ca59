"""The dashboard as data for a page that works without a kernel: where its panels are, and what their lines say."""

from __future__ import annotations

import base64
import io
from typing import Any

from dimo.run.checkpoints import STEP, step_of
from dimo.run.folder import RunFolder
from dimo.views.panels import dashboard_figure

DPI, MOST_SHEETS, SHEET_BYTES = 90, 8, 1_500_000  # of the curves; sample sheets that are kept, and their bytes


def stored_dashboard(run: RunFolder) -> tuple[dict[str, Any], bytes, str]:
    """What the page needs to tell the values at a step, and to show the samples of that time.

    Returns:
        {"panels": each with its title, `box` (left, top, width and height as shares of the picture), `x` (the steps at
        its edges) and lines}, "sheets": (step, PNG in base64)}; the picture as PNG; and what it shows, in words.

    Raises:
        DimoError: no step has been logged yet.
    """
    figure, picture = dashboard_figure(run), io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    panels = []
    for axis in figure.axes:
        left, bottom, width, height = axis.get_position().bounds
        lines = [
            {
                "label": line.get_label(),
                "steps": [float(step) for step in line.get_xdata()],
                "values": [float(f"{value:.4g}") for value in line.get_ydata()],
            }
            for line in axis.lines
            if isinstance(line.get_gid(), int)
        ]
        panels.append({
            "title": axis.get_title(loc="left"), "box": [left, 1 - bottom - height, width, height],
            "x": list(map(float, axis.get_xlim())), "lines": lines,
        })  # fmt: skip
    return {"panels": panels, "sheets": _sheets(run)}, picture.getvalue(), figure.about


def _sheets(run: RunFolder) -> list[tuple[int, str]]:
    """Up to `MOST_SHEETS` sample sheets over the run, the last among them, and as few as `SHEET_BYTES` allow."""
    files = sorted((run.path / "samples").glob(f"{STEP}.png"))
    for count in range(min(MOST_SHEETS, len(files)), 0, -1):
        chosen = [files[len(files) - 1 - i * (len(files) - 1) // max(1, count - 1)] for i in range(count)][::-1]
        if count == 1 or sum(file.stat().st_size for file in chosen) <= SHEET_BYTES:
            return [(step_of(file), base64.b64encode(file.read_bytes()).decode()) for file in chosen]
    return []
