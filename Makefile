# make demo | test | test-slow | compat | reliability | quality | docs | bench | release-check: all that a contributor
# needs. Everything is installed into .venv (compat: .venv-compat-*).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc)
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test test-slow compat compat-lowest compat-highest reliability quality docs linkcheck bench \
	release-check clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/faq_retrieval.py $(ARGS)

# One thread a process: tiny models gain nothing from more.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow $(ARGS)

# The lowest and the highest versions that setup.py allows; torch of PyPI takes gigabytes in each environment.
compat: compat-lowest compat-highest

compat-lowest: PYTHONS ?= python3.10
compat-highest: PYTHONS ?= python3.11 python3.12 python3.13
compat-lowest compat-highest: compat-%:
	for python in $(PYTHONS); do OMP_NUM_THREADS=1 $$python scripts/compat.py $* || failed=1; done; exit $${failed:-0}

# Some 20 minutes on two cores; then scripts/reliability.py writes the tables of docs/reliability.md.
reliability: install
	OMP_NUM_THREADS=1 $(BIN)/python scripts/reliability.py

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/mypy

docs: install
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# Asks the servers behind all links to the web, so it needs the internet; make test looks at all other links.
linkcheck: install
	$(BIN)/sphinx-build -b linkcheck docs docs/_build/linkcheck

# The quick tables; make bench BENCH=stage2_step ARGS="--teachers 1 2 4" for others.
BENCH ?= stage2_step inference

bench: install
	for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

# The wheel and the sdist, built in a temporary folder, and the wheel installed in an environment of its own.
release-check: install
	$(BIN)/python scripts/release.py

clean:
	rm -rf $(VENV) .venv-compat-* docs/_build outputs build *.egg-info
