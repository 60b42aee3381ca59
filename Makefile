# `make demo`, `make test` and `make lab` do everything on a bare machine with Python 3.11; again, each is quick.
PYTHON ?= python3
BIN := .venv/bin
# where it is set, every start would compile again what the first one compiles and keeps
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs test test-upstream upstream-source lint lab clean

# two files side by side; conftest.py says which come first
test: .venv/installed lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy dimo

demo: .venv/installed
	$(BIN)/dimo run -c shapes -p min_share=0.4 -p min_coverage=0.6 experiment.output_dir=runs/demo

# the documentation, with the demo's executed notebooks: build/site/index.html. The variable silences an advertisement
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the notebooks, to open and change; JupyterLab prints its address
lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_inputs.ipynb

# torch first and pinned: a looser range pulls gigabytes of CUDA. Not compiled: of 14,000 modules a fifth is ever imported.
# pip itself before all: Python 3.11's takes half a minute longer to choose among versions. While it installs the rest,
# another core compiles what commands import of torch
.venv/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.version_info < (3, 11) and sys.exit('dimo needs Python 3.11: make demo PYTHON=python3.11')"
	@echo "installing into .venv, once: PyTorch first, which is large, then dimo with its notebooks"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --disable-pip-version-check --no-compile --quiet --upgrade pip
	@$(BIN)/pip install --disable-pip-version-check --no-compile torch==2.13.0
	@echo "PyTorch is there; now 100 smaller packages, which takes about a minute"
	@$(BIN)/python -c "import torch._inductor.compile_fx, torch.distributed.fsdp" 2> /dev/null & \
		$(BIN)/pip install --disable-pip-version-check --no-compile --quiet -e ".[notebooks,dev,docs]"
	@touch $@

# beside URSA's own code: make test-upstream SOURCE=folder, one of baaivision/URSA at 29284bb
UPSTREAM := .venv-upstream/bin
test-upstream: upstream-source .venv-upstream/installed
	rm -rf .venv-upstream/source && cp -R "$(SOURCE)" .venv-upstream/source # its setup.py writes into its folder
	$(UPSTREAM)/pip install --disable-pip-version-check --force-reinstall --no-deps .venv-upstream/source
	$(UPSTREAM)/python -m pytest tests/test_upstream.py tests/test_golden.py tests/test_loading.py tests/test_bench.py \
		tests/test_sampling.py tests/test_reference_free.py

upstream-source:
	@test -f "$(SOURCE)/diffnext/__init__.py" || { echo "SOURCE=folder must be one of URSA's source"; exit 2; }

.venv-upstream/installed: pyproject.toml
	$(PYTHON) -m venv .venv-upstream
	$(UPSTREAM)/pip install --disable-pip-version-check torch==2.13.0
	$(UPSTREAM)/pip install --disable-pip-version-check -e ".[upstream,dev]"
	touch $@

clean:
	rm -rf .venv .venv-upstream
