# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

# The first that answers and is new enough; python3.11 is what constraints.txt was made with.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint claims clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## Train on the starter data, evaluate, export, search (about 7 minutes on 2 cores)
	$(BIN)/mmrl train configs/quickstart.yaml resume=auto
	$(BIN)/mmrl eval $(RUN) test-artist=starter:test-artist test-concepts=starter:test-concepts --captions 1 --out $(RUN)/test
	rm -rf $(RUN)/encoder-64 $(RUN)/embeddings $(RUN)/index
	$(BIN)/mmrl export $(RUN) $(RUN)/encoder-64 --dim 64
	$(BIN)/mmrl embed $(RUN) starter:test-artist $(RUN)/embeddings --group-key category
	$(BIN)/mmrl index $(RUN)/embeddings $(RUN)/index
	$(BIN)/mmrl search $(RUN)/index "red heart" --dim 64 --picture $(RUN)/red-heart.png
	@echo "In the browser: $(BIN)/mmrl serve $(RUN)/index"

test: lint  ## Lint, types, import directions and all tests but the slow ones
	$(BIN)/python -m pytest -n 2

test-all: lint  ## The same with the slow proofs
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(VENV)/.installed  ## Ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

claims: runs/world/NOTICE  ## Train and measure every rival of nesting, write tests/benchmarks/claims (hours on 2 cores; resumable)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/claims.py --world runs/world

runs/world/NOTICE: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/world.py runs/world

clean:  ## Remove the virtual environment and what was trained
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mmrl needs Python 3.11 or newer. Install one, or: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): about two minutes and 6 GB …"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
