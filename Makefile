# `make demo` and `make test` do everything on a bare machine with Python 3.11; running either again is quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

# two files side by side; conftest.py says which come first
test: .venv/installed lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check

demo: .venv/installed
	$(BIN)/dimo run -c shapes -p min_share=0.4 -p min_coverage=0.6 experiment.output_dir=runs/demo

# torch first and pinned: a looser range pulls gigabytes of CUDA
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -e ".[notebooks,dev]"
	touch $@

clean:
	rm -rf .venv
