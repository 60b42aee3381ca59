"""Pages of the documentation that are made when it is built (a hook of mkdocs): reference, notebooks, equations.

The notebooks come from the folder DIMO_NOTEBOOKS, executed ones (default: those of `make demo`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from dimo.commands.parser import make_parser
from dimo.config import PRESETS, config_keys
from dimo.config.schema import default_of, kind_of

NOTEBOOKS = Path("runs/demo/notebooks")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
# $$ ... $$ alone on its lines, or $ ... $ within a line
EQUATION = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.S)


def on_files(files, config):
    """Add the pages that are made."""
    made = {"reference/configuration.md": configuration(), "reference/commands.md": commands()}
    made |= notebooks(Path(os.environ.get("DIMO_NOTEBOOKS", NOTEBOOKS)))
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Equations become MathML, which browsers draw without a script; code is left alone."""
    parts = CODE.split(markdown)
    parts[::2] = [EQUATION.sub(_mathml, part) for part in parts[::2]]
    return "".join(parts)


def _mathml(found: re.Match) -> str:
    block = found["block"]
    return convert((block or found["inline"]).strip(), display="block" if block else "inline")


def configuration() -> str:
    """Every key with its type, default and meaning, and what the presets set."""
    lines = [
        "# Configuration\n",
        "Every key, as `dimo config` lists them. On the command line: `key=value`, or the last part of the key as a",
        "flag (`--lr 5e-4` is `optim.lr=5e-4`). Texts are kept as they are written (quotes around the whole text are",
        "taken off), numbers are decimal (`0x10`, `1_000` and `1,5` are refused), a path may begin with `~`, and",
        "`${group.key}` stands for another key's value.\n",
    ]
    group = None
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
    pages = [f"# Commands\n\n```\n{parser.format_help()}```\n"]
    pages += [f"## dimo {name}\n\n```\n{one.format_help()}```\n" for name, one in sub.items()]
    return "\n".join(pages)


def notebooks(folder: Path) -> dict[str, str | bytes]:
    """{path in the documentation: content} of the executed notebooks in a folder, and their index."""
    made: dict[str, str | bytes] = {}
    found = sorted(folder.glob("*.ipynb"))
    rows = [f"- [{path.stem}]({path.stem}.md)" for path in found]
    about = (
        f"Executed, from `{folder}`." if found else f"`make demo` executes them into `{NOTEBOOKS}`, then `make docs`."
    )
    made["notebooks/index.md"] = "\n".join(["# Notebooks\n", about, "", *rows, ""])
    if found:
        from nbconvert import MarkdownExporter

        for path in found:
            text, resources = MarkdownExporter().from_filename(
                str(path), resources={"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
            )
            made[f"notebooks/{path.stem}.md"] = text
            made |= {f"notebooks/{name}": data for name, data in resources["outputs"].items()}
    return made
