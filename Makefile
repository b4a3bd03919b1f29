# `make bench` ends with a table of ours, every peer and the floor; BENCH=--full or any option of benchmarks/conftest.py
# is passed on. `make demo` and `make test` need nothing but Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
VERSIONS ?= constraints.txt
BIN     = $(VENV)/bin

.PHONY: demo race test test-versions check bench static-report clean

demo: $(VENV)/ready
	$(BIN)/python -m perpo.demo

# Objectives, rounds and margins side by side (docs/race.md). Hours on one core; a second call goes on.
race: $(VENV)/ready
	$(BIN)/python -m perpo.demo.race

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The suite on the oldest versions that pyproject.toml allows, and on the newest that there are. Several gigabytes each.
test-versions:
	$(MAKE) test VENV=.venv-oldest VERSIONS=constraints-oldest.txt
	$(MAKE) test VENV=.venv-newest VERSIONS=constraints-newest.txt

check: $(VENV)/ready
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

bench: $(VENV)/ready-to-bench
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH)

static-report: $(VENV)/ready
	$(BIN)/python -m benchmarks.static_report

$(VENV)/ready: pyproject.toml $(VERSIONS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "perpo needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c $(VERSIONS) torch
	$(BIN)/pip install --quiet -c $(VERSIONS) -e '.[dev]'
	touch $@

$(VENV)/ready-to-bench: $(VENV)/ready
	$(BIN)/pip install --quiet -c $(VERSIONS) -e '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build *.egg-info
