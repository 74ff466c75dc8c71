# make demo   the whole road on real text (10 minutes on 2 cores after the install)
# make test   ruff, mypy, pytest
# make faults the tests of docs/reliability.md alone, their outcome in docs/reliability.json
# make format / make clean

# The first Python that can make a virtual environment; 3.11 is what constraints.txt was made with.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 python3; do \
	if $$name -c 'import ensurepip, venv' 2>/dev/null; then echo $$name; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# Folders with Python in them: mypy refuses one without.
TYPED := $(patsubst %/,%,$(sort $(dir $(wildcard fusiontree/*.py scripts/*.py benchmarks/*.py))))
SOURCES := $(TYPED) tests
# Two workers with one thread each beat one worker with two threads on the small models of the tests.
WORKERS ?= 2

.PHONY: demo test faults lint types format clean

demo: $(VENV)/.stamp-run
	$(BIN)/python -m fusiontree demo

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

faults: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m fault --fault-report docs/reliability.json

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.stamp-dev
	$(BIN)/mypy $(TYPED)

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python found; install Python 3.11 with its venv module" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp is written last, so that an interrupted install is done again.
$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
