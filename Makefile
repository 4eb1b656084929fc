# Each target does the set-up that it needs; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: install demo test test-long test-kill lint bench cuda-check numerics clean

install: $(READY)

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kdcore needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up .venv (torch is a large download, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/kdcore run examples/digits.toml

test: $(READY)
	$(BIN)/python -m pytest

test-long: $(READY)
	$(BIN)/python -m pytest -m "not gpu"

# runs killed at any instant must end with the uninterrupted run's student, by hash
N ?= 50
test-kill: $(READY)
	$(BIN)/python tests/kill.py $(N)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# after a change to files that decide trained weights: raise kdcore.NUMERICS if it changes one, then record the files
numerics: $(READY)
	$(BIN)/python tests/test_numerics.py

bench: $(READY)
	@echo "no benchmarks yet: they come with the compiled loss op"

cuda-check:
	@echo "no CUDA sources yet: they come with the compiled loss op"

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
