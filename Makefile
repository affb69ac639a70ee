# `make` alone lists what there is. Every target sets up .venv by itself when it is missing or old.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Without a folder for logs torch makes one, and leaves it behind.
RUN_RANKS := logs=$$(mktemp -d) && trap 'rm -rf "$$logs"' EXIT INT TERM && \
	$(BIN)/python -m torch.distributed.run --standalone --log-dir "$$logs" --nproc-per-node

# Ranks share the cores of this machine; more threads than cores make every run slower.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# For the isolated build of the package too: older pips read the first, newer ones the second.
export PIP_CONSTRAINT := $(abspath constraints.txt)
export PIP_BUILD_CONSTRAINT := $(abspath constraints.txt)

.PHONY: help setup demo test test-all check bench bench-plan bench-gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or 3.12: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(READY)  ## plan and train a small Llama on 4 local processes (3 to 5 minutes)
	$(RUN_RANKS) 4 -m galvatron_compile.demo

test: $(READY)  ## the test suite
	$(BIN)/pytest -m "not slow"

test-all: $(READY)  ## the test suite with the slow cases (8 ranks, large models) and fresh seeds
	GALVATRON_TEST_SEED=fresh $(BIN)/pytest

check: $(READY)  ## lint, formatting rules and strict types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## step time against the same strategies written by hand
	$(RUN_RANKS) 2 bench/step_time.py

bench-gpu: $(READY)  ## every kernel on one GPU: right, and how near to the roofline (9 minutes)
	$(BIN)/python bench/gpu.py

bench-plan: $(READY)  ## the planner: search, capture by depth, Galvatron's own numbers (5 minutes)
	$(BIN)/python bench/search_scale.py
	$(BIN)/python bench/capture_depth.py
	$(BIN)/python bench/against_galvatron.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
