# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

# Every pip call is constrained: without the pin, a dependency may bring another torch and gigabytes with it.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format docs clean

demo: .venv/demo.installed  ## train, audit and report on scikit-learn's digits: under four minutes on two cores
	$(BIN)/trivet demo

test: .venv/dev.installed  ## the whole test-suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev.installed  ## style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/dev.installed  ## the documentation site, in site/
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site dist build .*_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[digits,private]"
	touch $@

.venv/dev.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ .venv/demo.installed
