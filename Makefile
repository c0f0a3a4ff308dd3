# Two commands on a fresh machine: `make demo` and `make test`. Both make a virtual environment with
# everything in it (python3, make and a package index are enough); stamp files let a second run
# start at once. PYTHON picks the interpreter, VENV the place of the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
REQUIREMENTS := $(wildcard requirements/*.txt)
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Processes of one thread each: small towers gain nothing from more threads.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test types site tests slow docs setup setup-dev clean

help:
	@echo "make demo   set everything up and run 'ovsprune demo' (the whole job on the embedded model)"
	@echo "make test   set everything up and run every check"
	@echo "make docs   build the documentation into site/"
	@echo "make slow   the slow tests (full products), not part of 'make test'"
	@echo "make clean  remove the environment and everything that was built"

demo: $(VENV)/.ready
	$(BIN)/ovsprune demo $(DEMO_ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@# mypy and mkdocs run next to the tests: neither can use a second core.
	$(MAKE) --no-print-directory --jobs 3 types site tests

types: $(VENV)/.ready-dev
	$(BIN)/mypy

site: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A worker that has finished takes tests from the other one. Tests start in the order of the files,
# so that each worker builds most fixtures alone.
tests: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	    -m "not slow and not gpu and not upstream" $(PYTEST_ARGS)

slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

clean:
	rm -rf $(VENV) site dist build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "ovsprune needs Python 3.10 or newer; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' failed: install your system's package for it (python3-venv)" >&2; \
	    exit 1; }
	@touch $@

# One resolver call sees torch and torchvision together, without a pin on either, and so picks a
# pair that fits; asking for them one after another is how they come apart.
$(VENV)/.ready: pyproject.toml $(REQUIREMENTS) | $(BIN)/python
	@echo "Installing ovsprune and what it needs into $(VENV) (a few GB the first time) ..."
	@$(PIP) --editable ".[plots,frameworks,export]"
	@$(PIP) --no-deps --requirement requirements/mmseg.txt
	@$(BIN)/python -c "import open_clip" || { \
	    echo "The torch and torchvision in $(VENV) do not import together (see the error above)." >&2; \
	    echo "Remove $(VENV) and run make again, so that one resolver call picks the pair." >&2; \
	    exit 1; }
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "Installing the tools that check the project ..."
	@$(PIP) --editable ".[plots,frameworks,export,docs,dev]"
	@touch $@
