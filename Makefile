# Works in a fresh clone with Python >= 3.11 and a package index:
#   make demo      the embedded model writes a story, then answers eight prompts
#   make test      the quick tests, which need only a CPU
#   make test-slow the others that need only a CPU
#   make check     all that is asked of a change: style, types, import rules, tests
#   make test-kernels  the full matrices of the kernels, in interpret mode
#   make aot-kernels   compiles every kernel for H200 and three TPUs, and records it
#   make test-clients  other people's clients: openai, litellm, langchain, curl, schemathesis
#   make fix       formats, and mends what ruff can mend
#   make simulate  the scheduler simulator on 10,000 seeds
#   make bench-guard  compares the counts of compiled steps with the stored ones
#   make bench     throughput on the embedded model

PYTHON ?= python3
VENV ?= .venv
CLIENTS ?= .venv-clients
WORKERS ?= 2
SEEDS ?= 10000
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q
WITHOUT := not aot and not kernels
ELSEWHERE := --ignore tests/parity --ignore tests/aot

.PHONY: demo test test-slow test-kernels test-clients check lint parity aot aot-kernels fix simulate bench-guard bench clean
.DEFAULT_GOAL := test

# --- environment: a stamp per set of packages, older than pyproject.toml or not ---

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) install --editable '.[dev]'
	@touch $@

# The oracle of the parity tests; never needed to run jllm.
$(VENV)/.installed-torch: $(VENV)/.installed-test
	$(PIP) install torch==2.13.0
	@touch $@

$(VENV)/.installed-aot: $(VENV)/.installed-test
	$(PIP) install --editable '.[test,aot]'
	@touch $@

# In steps, or the resolver tries versions of openai for minutes.
$(CLIENTS)/.installed: tests/clients/requirements.txt $(VENV)/bin/python
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --quiet install openai litellm
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --quiet install \
	  --requirement tests/clients/requirements.txt
	@touch $@

# --- what users and developers call -------------------------------------------

demo: $(VENV)/.installed
	$(BIN)/jllm demo

test: $(VENV)/.installed-test
	$(PYTEST) -m "$(WITHOUT) and not slow" $(ELSEWHERE) \
	  --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m "$(WITHOUT) and slow" $(ELSEWHERE) \
	  --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-kernels: $(VENV)/.installed-test
	$(PYTEST) -m kernels --numprocesses $(WORKERS) $(PYTEST_ARGS) tests/pallas_kernels

test-clients: $(VENV)/.installed $(CLIENTS)/.installed
	$(BIN)/python -m tests.clients $(CLIENTS)/bin/python

check: lint parity aot bench-guard test-slow
	$(MAKE) test PYTEST_ARGS="--cov --cov-report=term $(PYTEST_ARGS)"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

parity: $(VENV)/.installed-torch
	$(PYTEST) tests/parity --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS)

aot: $(VENV)/.installed-aot
	$(PYTEST) tests/aot $(PYTEST_ARGS)

aot-kernels: $(VENV)/.installed-aot
	MOSAIC_GPU_DUMP_TO=$$(mktemp -d) \
	  $(BIN)/python -m tests.aot.compile_kernels gpu --table --record
	$(BIN)/python -m tests.aot.compile_kernels tpu --table --record

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

simulate: $(VENV)/.installed-test
	$(PYTEST) tests/jllm/scheduler/test_simulator.py --simulator-seeds $(SEEDS)

bench-guard: $(VENV)/.installed-aot
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.guard

bench: $(VENV)/.installed
	$(BIN)/jllm bench throughput

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .cache .pytest_cache .ruff_cache .hypothesis
