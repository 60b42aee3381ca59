"""Pages of the documentation that are made when it is built (a hook of mkdocs): reference, notebooks, equations.

The notebooks are executed ones: those in the folder DIMO_NOTEBOOKS, if it is set; else those of `make demo`; else they
are executed here, on the smoke preset, once for all builds that follow.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from dimo.commands.notebooks import NAMES, is_done, notebook_folder, own_kernel, run_notebooks
from dimo.commands.parser import make_parser
from dimo.config import PRESETS, config_keys
from dimo.config.schema import default_of, kind_of

DEMO, SMOKE, TOUR = Path("runs/demo/notebooks"), Path("build/smoke"), Path("build/tour/00_tour.ipynb")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
# $$ ... $$ alone on its lines, or $ ... $ within a line
EQUATION = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.S)
FIRST_NAME = re.compile(r"(?<=<tr>\n<td><code>)[^<]+")


def on_files(files, config):
    """Add the pages of the executed notebooks."""
    for name, content in notebooks(*executed()).items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lists go to the ends of their pages. Equations become MathML, which browsers draw without a script."""
    parts = CODE.split(markdown)
    parts[::2] = [EQUATION.sub(_mathml, part) for part in parts[::2]]  # code is left alone
    listed = {"reference/configuration.md": configuration, "reference/commands.md": commands}.get(page.file.src_uri)
    return "".join(parts) + (f"\n{listed()}" if listed else "")


def on_page_content(html, page, config, files):
    """Names in a table's first column may be broken after a dot or an underscore, which a phone needs."""
    return FIRST_NAME.sub(lambda found: found[0].replace("_", "_<wbr>").replace(".", ".<wbr>"), html)


def _mathml(found: re.Match) -> str:
    block = found["block"]
    return convert((block or found["inline"]).strip(), display="block" if block else "inline")


def configuration() -> str:
    """Every key with its type, default and meaning, and what the presets set."""
    lines, group = list[str](), None
    for key, field in config_keys().items():
        if key.split(".")[0] != group:
            group = key.split(".")[0]
            lines += [f"\n## {group}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
        help = field.metadata["help"].replace("|", "\\|")
        kind = kind_of(field).replace("|", "or")
        lines.append(f"| `{key.split('.')[1]}` | {kind} | `{default_of(field)}` | {help} |")
    lines += ["\n## Presets\n", "What each preset sets; everything else is the default.\n"]
    for path in sorted(PRESETS.glob("*.yaml")):
        about = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        keys = yaml.safe_load(path.read_text())
        listed = "\n".join(f"{g}.{k}={v}" for g, part in keys.items() for k, v in part.items())
        lines.append(f"### {path.stem}\n\n{' '.join(about)}\n\n```\n{listed}\n```\n")
    return "\n".join(lines)


def commands() -> str:
    """The help text of every command."""
    os.environ["COLUMNS"] = "110"  # argparse wraps its text at this width
    parser, sub = make_parser()
    pages = [f"```\n{parser.format_help()}```\n"]
    pages += [f"## dimo {name}\n\n```\n{one.format_help()}```\n" for name, one in sub.items()]
    return "\n".join(pages)


def executed() -> tuple[list[Path], str]:
    """Executed notebooks, and a sentence on them."""
    if "DIMO_NOTEBOOKS" in os.environ:
        folder = Path(os.environ["DIMO_NOTEBOOKS"])
        done = [path for path in sorted(folder.glob("[!.]*.ipynb")) if not path.stem.endswith(".failed")]
        return done, f"Executed, from `{folder}`."
    names = [f"{name}.ipynb" for name in NAMES]
    folder, about = DEMO, "The tour shows what ships; the others are those of `make demo`, whose student stops early."
    if not all((DEMO / name).exists() for name in names):
        with contextlib.redirect_stdout(io.StringIO()):  # how it ends is about a run, and this one teaches nothing
            folder = run_notebooks("smoke", [f"experiment.output_dir={SMOKE}"]).path / "notebooks"
        about = (
            "The tour shows what ships. The others were executed on the smoke preset, in which every part runs and "
            "little is learnt; after `make demo`, `make docs` shows a student that has learnt more."
        )
    return [tour(), *(folder / name for name in names)], about


def tour() -> Path:
    """The notebook that looks at what ships, executed."""
    source = notebook_folder() / TOUR.name
    if not is_done(TOUR, source, {}):
        import papermill

        TOUR.parent.mkdir(parents=True, exist_ok=True)
        with own_kernel() as kernel:
            papermill.execute_notebook(
                str(source), str(TOUR), kernel_name="python3", kernel_manager_class=kernel, progress_bar=False
            )
    return TOUR


def notebooks(found: list[Path], about: str) -> dict[str, str | bytes]:
    """{path in the documentation: content} of executed notebooks, and their index."""
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    made: dict[str, str | bytes] = {}
    rows = []
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    for path in found:
        text, resources = exporter.from_filename(
            str(path), resources={"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        )
        text = text.replace(f"{Path.cwd()}/", "")  # not the folder of whoever built the site
        made[f"notebooks/{path.stem}.md"] = text
        made |= {f"notebooks/{name}": data for name, data in resources["outputs"].items()}
        title = re.search(r"^# (.+)$", text, re.M)
        rows.append(f"- [{title[1] if title else path.stem}]({path.stem}.md)")
    made["notebooks/index.md"] = "\n".join(["# Notebooks\n", about, "", *rows, ""])
    return made
