# All targets run in .venv, which is created on first use. `make help` lists the targets.

# The first interpreter of version 3.11 or newer. constraints.txt was made with 3.11.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint claims clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## Train on the starter data, evaluate, export, search (about 10 minutes on 2 cores, with the installation)
	$(BIN)/mmrl train configs/quickstart.yaml resume=auto
	rm -rf $(RUN)/encoder-64 $(RUN)/embeddings $(RUN)/index
	$(BIN)/mmrl export $(RUN) $(RUN)/encoder-64 --dim 64 --json > $(RUN)/export.json
	$(BIN)/mmrl embed $(RUN) starter:test-artist $(RUN)/embeddings --group-key category --json > $(RUN)/embed.json
	$(BIN)/mmrl index $(RUN)/embeddings $(RUN)/index --json > $(RUN)/index.json
	$(BIN)/mmrl search $(RUN)/index "red heart" --dim 64 --picture $(RUN)/red-heart.png --json > $(RUN)/search.json
	$(BIN)/mmrl eval $(RUN) test-artist=starter:test-artist test-concepts=starter:test-concepts --captions 1 --out $(RUN)/test
	@echo "  $(BIN)/mmrl serve $(RUN)/index  # search in a browser; $(RUN)/red-heart.png is an answer, $(RUN)/encoder-64 a 64-d encoder"

test: lint  ## Lint, and all tests except the slow ones
	$(PYTEST)

test-all: lint  ## Lint, and all tests
	$(PYTEST) -m "slow or not slow"

lint: $(VENV)/.installed  ## Check style, types and import directions: ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --threads 2 --pythonpath $(BIN)/python
	$(BIN)/lint-imports

claims: runs/world/NOTICE  ## Compare nested training with its alternatives, write tests/benchmarks/claims (hours on 2 cores; resumable)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/claims.py --world runs/world

runs/world/NOTICE: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/world.py runs/world

clean:  ## Remove the virtual environment and all runs
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mmrl needs Python 3.11 or newer. Install one, or: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): about two minutes and 8 GB …"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
