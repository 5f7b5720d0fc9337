# Everything happens in .venv, which is made on first use and brought up to date when
# pyproject.toml or constraints.txt change. `make` alone lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Test processes: one per core, at most 8 (each holds a 135 M parameter model). torch gets the rest.
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); [ $$n -gt 8 ] && n=8; echo $$n)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo data test test-slow lint format hooks docs docs-serve models bench wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train adapters on real texts and show the result; DEMO_STEPS=n for a shorter or longer run
	$(if $(DEMO_STEPS),DEMO_STEPS=$(DEMO_STEPS) )$(BIN)/python examples/demo.py

data: $(VENV)/.demo ## fetch the real weights and texts into the user's cache folder
	$(BIN)/python examples/real_data.py

test: lint docs ## lint, type check, documentation, tests and doctests
	$(PYTEST)

test-slow: $(VENV)/.dev ## the tests that need minutes
	$(PYTEST) -m slow

lint: $(VENV)/.dev ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --quiet --check --diff
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

# The variable silences mkdocs-material's note on the future of mkdocs. (--quiet would let warnings pass.)
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.dev ## build the documentation into site/; a warning is an error
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.dev ## show the documentation, built anew as you write
	$(BIN)/python -m mkdocs serve

hooks: $(VENV)/.dev ## check style and types before every commit, by pre-commit
	$(BIN)/pre-commit install

models: $(VENV)/.dev ## write docs/models.md anew from what the tests of the model families declare
	$(BIN)/python tests/families.py --write

wheel: $(VENV)/.dev ## build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation

bench: $(VENV)/.bench ## run every benchmark, one table each
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove .venv, caches and build outputs (not the cache of weights and texts)
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
