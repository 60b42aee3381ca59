"""The wheel holds everything that an empty folder needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's contents as pip lays them out, and the environment to run from it."""
    made, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("prefix") / "lib"
    source = tmp_path_factory.mktemp("source") / "dimo"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(made), str(source)]  # torch has setuptools
    subprocess.run([*pip, *build], check=True)
    wheel = next(made.glob("dimo-*.whl"))
    subprocess.run(
        [*pip, "install", "--ignore-installed", "--no-deps", "--no-compile", "--prefix", str(site.parent), str(wheel)],
        check=True,
    )
    packages = next(site.glob("python*/site-packages"))
    return wheel, packages


# `dimo run`, and a report whose explorer has one setting: test_browser looks at whole ones
RUN = """
import functools, sys, dimo
from dimo.__main__ import main
from dimo.commands import notebooks
print(dimo.__file__, notebooks.notebook_folder(), flush=True)
notebooks.write_run_report = functools.partial(notebooks.write_run_report, most=1)
sys.exit(main())
"""


def run(installed, folder, *words):
    env = {**os.environ, "PYTHONPATH": str(installed[1])}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)


def test_the_wheel_holds_worlds_presets_and_notebooks_and_nothing_else(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "dimo").rglob("*") if path.is_file()}
    inside = {name for name in inside if "__pycache__" not in name}
    assert inside - set(names) == set()
    notebooks = [name.split("/")[-1] for name in names if name.endswith(".ipynb")]
    assert sorted(notebooks) == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert [name for name in names if not name.startswith("dimo") or "/tests/" in name] == []


def test_it_runs_from_an_empty_folder(installed, tmp_path):
    keys = ["training.max_train_steps=2", "distill.batch_size_per_gpu=1", "experiment.output_dir=out"]
    done = run(installed, tmp_path, "-c", RUN, "run", "-c", "smoke", "--only", "03_train", *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    module, notebooks = done.stdout.splitlines()[0].split()
    assert Path(module).is_relative_to(installed[1]) and Path(notebooks).is_relative_to(installed[1].parents[2])
    assert (tmp_path / "out/checkpoints/final/student.pt").exists()
