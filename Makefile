# Needs Python 3.11 or later (with its headers), g++ and make; everything else goes into .venv.
#
#   make demo    embed sentences with streamed weights (examples/quickstart.py)
#   make test    the test suite
#   make docs    the documentation as a site, in site/
#   make lint    ruff and mypy
#   make fuzz    the property tests, 10 000 examples each (hours)
#   make clean   remove .venv and what the tools leave behind
#
#   make PYTHON=python3.12 test    another Python (after make clean)
#   make ARGS="-k planner" test    more arguments for pytest

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt

# A virtual environment, or a PYTHONPATH, of the caller's must not reach into ours.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo test docs lint fuzz clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(INSTALLED)
	@$(BIN)/python examples/quickstart.py

# One process for each core; each with one thread, as they share the cores already.
test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

# Not --quiet: with it mkdocs counts no warnings, and --strict lets everything pass.
docs: $(INSTALLED)
	@$(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# `-m hypothesis` selects the tests under @given: hypothesis marks them.
fuzz: $(INSTALLED)
	@HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m hypothesis --timeout=0 $(ARGS)

# Torch goes first, by its exact version: pip then takes a build of that version that is already at hand, and leaves it
# alone afterwards. A range would bring the newest torch, with gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, $(PYTHON) is {sys.version}")'
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch into $(VENV)"
	@$(PIP) torch==2.13.0
	@echo "installing spcompile and its tools into $(VENV)"
	@$(PIP) --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find spcompile passes tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
