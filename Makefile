PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits

# how the packages are installed; other versions: INSTALL=".venv/bin/pip install"
INSTALL ?= $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-slow lint types wheel clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[dev,tensorboard]"
	touch $@

demo: setup
	test -f $(RUN)/config.json || $(BIN)/nelbo train digits --out $(RUN)
	$(BIN)/nelbo train --resume $(RUN)
	$(BIN)/nelbo evaluate $(RUN)
	$(BIN)/nelbo evaluate $(RUN) --steps 8
	$(BIN)/nelbo sample $(RUN) --n 64 --steps 32 --seed 0 --out $(RUN)/samples.png
	$(BIN)/nelbo report $(RUN)
	@echo "Look at $(RUN)/report.html and $(RUN)/samples.png"

test: setup lint types wheel
	$(PYTEST) -m "not slow"

# Statistics that take long.
test-slow: setup
	$(PYTEST) -m slow tests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell src tests benchmarks docs *.md

types: setup
	$(BIN)/mypy

# The built wheel runs by itself: nothing is missing from it.
wheel: setup
	rm -rf build && $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w build .
	cd build && PYTHONPATH=$$(ls nelbo-*.whl) ../$(BIN)/python -m nelbo --version

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache
