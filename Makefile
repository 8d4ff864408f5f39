PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-fast lint

train: .venv/ready  ## train a ResNet-50 on handwritten digits
	$(BIN)/python examples/train_digits.py

test: .venv/ready  ## every test, doctest and README block
	$(BIN)/python -m pytest

test-fast: .venv/ready  ## the development loop
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
