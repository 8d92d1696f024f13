.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Exact versions: constraints.txt holds the newest that were tested, constraints-oldest.txt the oldest.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,check,benchmarks
# .venv, or .venv-oldest
VENV := .venv$(patsubst constraints%.txt,%,$(CONSTRAINTS))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled files are kept, whatever the caller's setting: tests start many processes.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
  $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What `make dist` and `make wheelhouse` write, and the extras of an offline machine.
DIST ?= dist
WHEELHOUSE ?= wheelhouse
BUILD ?= build
OFFLINE ?= excel,gguf

.PHONY: help setup medical browser bases test check structure format site base dist wheelhouse clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## make .venv and install the exact tested versions

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@# pip would compile on one core, and the packages' own tests too; what cannot be compiled is never imported.
	@$(BIN)/python -m compileall -q -q -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $(STAMP)

medical: $(STAMP) ## train and evaluate the medical adapter on the embedded base and rows
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/medical.py

browser: ## install Chromium for the tests of pages, where apt-get can
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "No Chromium here: the tests that need one are skipped."

bases: $(STAMP) ## get SmolLM2-135M-Instruct and all-MiniLM-L6-v2 for the tests, into .bases/ (180 MB)
	@$(BIN)/python tests/support/bases.py

test: $(STAMP) browser ## run every test but the longest; those without their base are skipped
	-@$(BIN)/python tests/support/bases.py
	$(TESTS) -m "not long"

test-all: $(STAMP) browser ## run the longest tests too: every kind of base, training on pretrained ones
	-@$(BIN)/python tests/support/bases.py
	$(TESTS)

check: $(STAMP) ## lint, format, spelling, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

structure: $(STAMP) ## print the sizes of rooms, files and functions; exit 1 above a limit
	$(BIN)/python tests/support/structure.py

format: $(STAMP) ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(STAMP) ## build the pages of docs/ into site/, without a network
	@$(BIN)/python -c "import material" 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

base: $(STAMP) ## rebuild the embedded base (up to 30 minutes)
	$(BIN)/python -m benchmarks.embedded.build

dist: $(STAMP) ## build wheel and sdist, and run the main job from the wheel in an empty environment
	rm -rf $(DIST)
	$(BIN)/python -m build --outdir $(DIST) .
	$(PYTHON) -m venv --clear $(BUILD)/installed
	$(BUILD)/installed/bin/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) $(DIST)/*.whl
	$(BIN)/python tests/support/installed.py $(BUILD)/installed/bin

wheelhouse: $(STAMP) ## collect what a machine without network installs, and install from it without an index
	$(BIN)/pip wheel --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --wheel-dir $(WHEELHOUSE) '.[$(OFFLINE)]'
	cp $(CONSTRAINTS) $(WHEELHOUSE)/constraints.txt
	$(PYTHON) -m venv --clear $(BUILD)/offline
	$(BUILD)/offline/bin/pip install --quiet --disable-pip-version-check --no-index --find-links $(WHEELHOUSE) \
	  --constraint $(WHEELHOUSE)/constraints.txt 'lora-domains[$(OFFLINE)]'
	$(BIN)/python tests/support/installed.py $(BUILD)/offline/bin

clean: ## remove the virtual environment and what was built
	rm -rf .venv .venv-oldest build dist site wheelhouse *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
