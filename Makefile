PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits

# how the packages are installed; other versions: INSTALL=".venv/bin/pip install"
# Of the packages' many modules few are imported: these are compiled when they are, and kept for
# the processes that follow, also where the environment keeps no bytecode.
INSTALL ?= $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
export PYTHONDONTWRITEBYTECODE =
# A file's tests share what they prepare, and so one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: setup demo test test-slow test-lowest docs lint types wheel clean

setup: .venv/ready

# First a pip that does not read the metadata of all packages for each of them: it takes two thirds
# of the time of that of Python 3.11.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip
	$(INSTALL) -e ".[dev]"
	touch $@

demo: setup
	if test -f $(RUN)/config.json; then $(BIN)/nelbo train --resume $(RUN); else $(BIN)/nelbo train digits --out $(RUN); fi
	$(BIN)/nelbo evaluate $(RUN)
	$(BIN)/nelbo evaluate $(RUN) --steps 8
	$(BIN)/nelbo sample $(RUN) --n 64 --steps 32 --seed 0 --out $(RUN)/samples.png
	$(BIN)/nelbo report $(RUN)
	@echo "Look at $(RUN)/report.html and $(RUN)/samples.png"

test: setup lint types wheel docs
	$(PYTEST) -m "not slow"

# Statistics that take long.
test-slow: setup
	$(PYTEST) -m slow tests

# The site, in site/; a link that leads nowhere, or a page that fetches from elsewhere, is an error.
# Not --quiet: what is not said is not counted by --strict.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The readers and the command line with the lower bounds of pyproject.toml, without the tests that
# need transformers or tensorboard.
test-lowest: .venv-lowest/ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -p no:anyio -n 2 -m "not slow and not multiprocess" \
		tests/data tests/cli --ignore tests/data/test_tokens_of_text.py -k "not tensorboard"

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip
	.venv-lowest/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints-lowest.txt -e ".[tables,hub,codec]" \
		hypothesis pandas pytest pytest-xdist
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell src tests benchmarks docs *.md

types: setup
	$(BIN)/mypy

# Source and wheel are what an index takes; the wheel runs by itself: nothing is missing from it. That
# what builds them is declared, `setup` has shown, which builds in an environment of its own.
wheel: setup
	rm -rf build && $(BIN)/python -m build --no-isolation --outdir build . > /dev/null
	$(BIN)/twine check --strict build/*
	cd build && PYTHONPATH=$$(ls nelbo-*.whl) ../$(BIN)/python -m nelbo --version

clean:
	rm -rf build .venv .venv-lowest site .mypy_cache .ruff_cache .pytest_cache
