"""`dimo report`: a run as one page that works by click and key, without a kernel and without a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dimo.errors import DimoError, reason
from dimo.evaluation.evaluate import format_cell
from dimo.evaluation.metrics import columns_of, legend
from dimo.evaluation.summary import prompts_of, read_report, teachers_of
from dimo.files import write_text
from dimo.run.checkpoints import STEP, step_of
from dimo.run.folder import RunFolder
from dimo.run.origin import run_config
from dimo.views.alarms import alarms
from dimo.views.clips import write_frames
from dimo.views.dashboard import named
from dimo.views.dashboard_stored import stored_dashboard
from dimo.views.explorer import HERE, PAGE, STYLE
from dimo.views.explorer_data import one_pass
from dimo.views.explorer_stored import BYTES, stored
from dimo.views.explorer_view import ExplorerView
from dimo.views.models import checkpoints_of, open_models
from dimo.worlds import checkpoint_folder, is_world

MOST, CLIPS = 10_000_000, 4  # bytes of the page; clips shown
BESIDE = 1_500_000  # bytes of clips.mp4 that the page has room for
SMALL = 2**18  # pixels of a video: of such a world several checkpoints are shown
SCRIPTS = (PAGE, HERE / "explorer_stored.js", HERE / "dashboard_stored.js", HERE / "clips.js")
LOOK = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1b1b; max-width: 1300px; margin: 1.5em auto;
  padding: 0 1em; }
img, video { max-width: 100%; } figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; }
figcaption { font-size: 13px; color: #444; } video { display: block; }
figure video { width: 256px; image-rendering: pixelated; }
.clip { padding: 0; border: 0; cursor: pointer; } .clip[aria-pressed=true] video { opacity: .6; }
table { border-collapse: collapse; } td, th { text-align: right; padding: .2em .6em; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; line-height: 1.2; } small { color: #555; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.curves { position: relative; display: inline-block; cursor: crosshair; } .curves img { display: block; }
.curves i { position: absolute; width: 0; border-left: 1.5px solid #d55e00; pointer-events: none; }
.curves:focus-visible, .clip:focus-visible { outline: 2px solid #d55e00; }
.told { font-size: 13px; font-variant-numeric: tabular-nums; }
#board { display: grid; grid-template-columns: auto minmax(230px, 1fr); gap: 0 1.5em; align-items: start; }
@media (max-width: 1000px) { #board { grid-template-columns: minmax(0, 1fr); } } .told h3, .told p { margin: .4em 0; }
pre { font-size: 12px; background: #f6f6f6; padding: .6em; overflow-x: auto; }
"""


def write_run_report(run: RunFolder, most: int = BYTES) -> Path:
    """Write report.html of a run: table, explorer, curves, alarms, clips, settings and environment.

    Pictures, clips and the data of explorer and dashboard are in the file itself; only the links to the executed
    notebooks are not.

    Args:
        most: bytes that the explorer's stored values may take; the fewer, the fewer settings there are.

    Raises:
        DimoError: the folder is no run.
    """
    if not run.is_dimos():
        raise DimoError(f"{run.path} is not a run folder of dimo: it has no config.yaml of a run")
    parts, at = [f"<h1>{html.escape(run.path.name)}</h1>", _table(run)], _checkpoints(run)
    try:
        explorer = ExplorerView([open_models(run, step) for step in at] or [open_models(run)])
    except DimoError as error:
        parts.append(f"<h2>Explorer</h2><p>There is none: {html.escape(str(error))}.</p>")
        at = []
    else:
        parts.append(
            f"<h2>Explorer: {html.escape(explorer.models[0].label)}</h2>"
            "<p>Click a token, or move it by the arrow keys; page keys change the frame, comma and full stop t, "
            "s the statistic, n the network, l the scale; a keeps this state beside the next.</p>"
            f'<div id="explorer"></div>{_data("stored", stored(explorer, most, progress=True))}'
        )
        parts.append(_clips(explorer))
    parts += [_curves(run, at), _pictures(run), _about(run)]
    script = "".join(file.read_text(encoding="utf-8") for file in SCRIPTS)
    style = LOOK + STYLE.read_text(encoding="utf-8")
    rules = f"default-src 'none'; img-src data:; media-src data:; style-src '{_hash(style)}'"
    rules += f"; script-src '{_hash(script)}'"
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(run.path.name)}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{rules}"><link rel="icon" href="data:,">'
        f"<style>{style}</style><body>{''.join(parts)}"
        f'<script type="module">{script}</script></body></html>\n'
    )
    if len(page) > MOST:
        print(f"dimo: report.html has {len(page):,} bytes, more than {MOST:,}", file=sys.stderr)
    write_text(run.path / "report.html", page)
    return run.path / "report.html"


def _checkpoints(run: RunFolder) -> list[int | str]:
    """The checkpoints that the explorer shows, the newest first: of a small world up to three, else one.

    The last numbered one of a finished run is left out, since final comes from the same step.
    """
    there = checkpoints_of(run.path)
    try:
        config = run_config(run.path)
    except DimoError:
        return there[-1:]  # why it cannot be read, opening it says
    d, folder = config.distill, checkpoint_folder(config.distill.teacher_ckpt)
    if not is_world(folder) or d.num_frames * d.height * d.width > SMALL:
        return there[-1:]
    if there[-1:] == ["final"] and there[-2:-1] == [run.status().get("step")]:
        del there[-2]
    earlier = there[:-1]
    return list(dict.fromkeys([*there[-1:], *earlier[len(earlier) // 2 :][:1], *earlier[:1]]))


def _data(name: str, values: Any) -> str:
    """Values for a script of the page."""
    text = json.dumps(values).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _hash(text: str) -> str:
    """The source expression of an inline style or script in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _table(run: RunFolder) -> str:
    file = run.path / "report.json"
    if not file.exists():
        return ""
    try:
        rows = read_report(file)
    except DimoError as error:
        return f"<p>There is no table: {html.escape(str(error))}.</p>"
    columns = columns_of(rows)
    head = "".join(f"<th>{c}</th>" for c in ("", *columns))
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{_cell(row, c)}</td>' for c in columns)}</tr>"
        for name, row in rows.items()
    )
    meanings = "<br>".join(html.escape(sentence) for sentence in legend(rows))
    about = f"<details><summary>What the columns mean</summary><p>{meanings}</p></details>"
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in (teachers_of(rows), prompts_of(rows)) if sentence)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>{said}{about}"


def _cell(row: dict, column: str) -> str:
    """A metric's value, with its interval in small print below."""
    value, bracket, interval = format_cell(row, column).partition(" [")
    return value + (f"<br><small>[{interval}</small>" if bracket else "")


def _clips(explorer: ExplorerView) -> str:
    """Looping clips of the student, one pass each, or a sentence on why there are none."""
    models = explorer.models[0]
    if models.ursa.vae is None:
        return f"<h2>Clips</h2><p>There are none: {html.escape(models.ursa.no_vae)}.</p>"
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in models.some_prompts(CLIPS):
            codes = one_pass(models, prompt).x_hat
            frames = models.ursa.decode(codes.view(-1, *models.grid))[0].cpu()
            try:
                file = write_frames(Path(folder) / "clip", frames)
            except (DimoError, ImportError) as error:
                return f"<h2>Clips</h2><p>There are none: {html.escape(reason(error))}.</p>"
            alt, show = f"the student's video of: {prompt}", _video if file.suffix == ".mp4" else _image
            shown.append(
                f"<figure>{show(file.read_bytes(), alt)}<figcaption>{html.escape(prompt)}</figcaption></figure>"
            )
    how = "<p>A click, or enter, stops one and lets it go on.</p>" if any("<video" in clip for clip in shown) else ""
    return f"<h2>Clips of the student, one pass</h2>{how}{''.join(shown)}"


def _curves(run: RunFolder, checkpoints: list[int | str]) -> str:
    rows = run.metrics()
    if not rows:
        return "<h2>Curves</h2><p>No step has been logged yet.</p>"
    data, picture, alt = stored_dashboard(run)
    last = run.status().get("step", rows[-1]["step"])
    data["checkpoints"] = [(last if at == "final" else at, i, named(at)) for i, at in enumerate(checkpoints)]
    found = [f"<li>step {a.step}: {html.escape(a.name)}: {html.escape(a.sentence)}</li>" for a in alarms(rows)]
    rang = f"<ul>{''.join(found)}</ul>" if found else "<p>None.</p>"
    how = "Click a step, or move it by the arrow keys: beside them are its values, and the samples of that time"
    how += ", and the explorer goes to the nearest checkpoint." if len(checkpoints) > 1 else "."
    board = f'<div id="board">{_image(picture, alt)}{_samples(run)}</div>{_data("logged", data)}'
    return f"<h2>Curves</h2><p>{how}</p>{board}<h2>Alarms</h2>{rang}"


def _samples(run: RunFolder) -> str:
    files = sorted((run.path / "samples").glob(f"{STEP}.png"))[-1:]
    shown = [f"samples at step {step_of(file)}" for file in files]
    pictures = [_image(file.read_bytes(), alt) + f"<figcaption>{alt}</figcaption>" for file, alt in zip(files, shown)]
    return "".join(f'<figure id="samples">{picture}</figure>' for picture in pictures)


def _pictures(run: RunFolder) -> str:
    """sheet.png and clips.mp4, the latter as a link where it is too large for the page."""
    about = "videos of teacher and student for some prompts, from the same noise"
    sheet, clips, parts = run.path / "sheet.png", run.path / "clips.mp4", list[str]()
    if sheet.exists():
        parts.append(f"<h2>{sheet.name}</h2>{_image(sheet.read_bytes(), f'{sheet.name}: {about}')}")
    if clips.exists():
        fits = clips.stat().st_size <= BESIDE
        shown = _video(clips.read_bytes(), f"{clips.name}: {about}") if fits else f"<a href='{clips.name}'>{about}</a>"
        parts.append(f"<h2>{clips.name}</h2>{shown}")
    return "".join(parts)


def _video(data: bytes, alt: str) -> str:
    source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    video = f'<video autoplay loop muted playsinline src="{source}"></video>'
    return f'<button class="clip" aria-pressed="false" aria-label="stop {html.escape(alt)}">{video}</button>'


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _about(run: RunFolder) -> str:
    notebooks = sorted((run.path / "notebooks").glob("0?_*.html"))
    links = "".join(f'<li><a href="notebooks/{file.name}">{file.stem}</a></li>' for file in notebooks)
    parts = [f"<h2>Notebooks</h2><ul>{links}</ul>"] if links else []
    for name in ("config.yaml", "environment.json", "status.json"):
        file = run.path / name
        if file.exists():
            text = html.escape(file.read_text(encoding="utf-8", errors="replace"))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "<h2>Settings and environment</h2>" + "".join(parts)
