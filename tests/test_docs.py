"""The documentation as a site: it builds without a warning, and what is made at build time is there."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest

import docs
from dimo.commands.cli import parse
from dimo.config import config_keys, load_config
from dimo.config.flags import as_override, flags

ROOT = Path(__file__).parent.parent
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, with one executed notebook."""
    folder = tmp_path_factory.mktemp("docs")
    image = nbformat.v4.new_output("display_data", {"image/png": PIXEL})
    cell = nbformat.v4.new_code_cell("show()", outputs=[image], execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "01_inputs.ipynb")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    env = {"DIMO_NOTEBOOKS": str(folder), "NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_every_key_and_every_command_has_its_place(site):
    page = (site / "reference/configuration.html").read_text().replace("<wbr>", "")
    assert [key for key in config_keys() if f"<code>{key.split('.')[1]}</code>" not in page] == []
    commands = (site / "reference/commands.html").read_text()
    assert all(f"usage: dimo {name}" in commands for name in ("train", "run", "evaluate", "sample", "world"))


def test_an_executed_notebook_is_shown_with_its_picture(site):
    page = (site / "notebooks/01_inputs.html").read_text()
    picture = re.search(r'src="(01_inputs_files/[^"]+\.png)"', page)
    assert picture and (site / "notebooks" / picture[1]).read_bytes().startswith(b"\x89PNG")


def test_the_demos_notebooks_are_taken_where_they_are_all_there_and_else_made(tmp_path, monkeypatch):
    asked = []
    made = types.SimpleNamespace(path=tmp_path / "smoke")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIMO_NOTEBOOKS", raising=False)
    monkeypatch.setattr(docs, "tour", lambda: Path("00_tour.ipynb"))
    monkeypatch.setattr(docs, "run_notebooks", lambda preset, keys: asked.append((preset, keys)) or made)
    demo = tmp_path / "runs" / "demo" / "notebooks"
    demo.mkdir(parents=True)
    for name in list(docs.NAMES)[:-1]:
        (demo / f"{name}.ipynb").touch()
    found, about = docs.executed()
    assert asked == [("smoke", ["experiment.output_dir=build/smoke"])] and "little is learnt" in about
    assert [path.name for path in found] == ["00_tour.ipynb", *(f"{name}.ipynb" for name in docs.NAMES)]
    assert found[-1].parent == made.path / "notebooks"
    (demo / f"{list(docs.NAMES)[-1]}.ipynb").touch()
    found, about = docs.executed()
    assert len(asked) == 1 and found[-1].resolve().parent == demo and "make demo" in about


def test_equations_are_drawn_without_a_script(site):
    page = (site / "concepts.html").read_text()
    assert page.count("<math") > 10 and "$$" not in page and "KL" in page


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(r'<(?:script|img|link)[^>]*?(?:src|href)="(https?://[^"]+)"')
    assert [(page.name, found) for page in site.rglob("*.html") for found in loads.findall(page.read_text())] == []


GUIDES = [ROOT / "README.md", ROOT / "docs/getting-started.md", *sorted((ROOT / "docs/guides").glob("*.md"))]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_taken_as_they_stand(page):
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    +(dimo [a-z].*)$", text, re.M):
        if "$" in line:  # within a loop of the shell
            continue
        args = parse(shlex.split(line, comments=True)[1:])
        if "overrides" in args and args.command != "evaluate":
            words = [word.partition("=") for word in getattr(args, "parameters", [])]
            load_config(args.config, [*args.overrides, *(as_override(flags().get(k, k), v) for k, _, v in words)])


def test_files_that_documentation_and_makefile_name_are_there():
    invented = {"extending.md", "experiments-shapes.md"}  # examples, and files of earlier commits
    pages = [ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md", "mkdocs.yml")]
    pages += [page for page in (ROOT / "docs").rglob("*.md") if page.name not in invented]
    path = r"\b(?:dimo|scripts|tests|notebooks)/[\w/-]+\.(?:py|ipynb|yaml)\b"
    named = {(page.name, file) for page in pages for file in re.findall(path, page.read_text())}
    assert len(named) > 50
    assert [(page, file) for page, file in sorted(named) if not (ROOT / file).exists()] == []


def test_links_lead_to_files_of_the_repository_where_no_site_has_been_built():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    targets = {
        (page.relative_to(ROOT), link.split("#")[0])
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not link.startswith(("http", "#"))
    }
    assert len(targets) > 60
    assert [(page, link) for page, link in sorted(targets) if not (ROOT / page.parent / link).exists()] == []


def test_the_readme_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
