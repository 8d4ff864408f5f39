PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin/python
# Where pyenv has it, the oldest Python that fresnet runs on.
OLDEST_PYTHON ?= $(lastword $(PYTHON) $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3))
# Two processes of one thread each: much of the time goes into compiling, on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: train test test-fast test-oldest test-long lint docs release bench bench-full bench-gpu

train: .venv/ready  ## train a ResNet-50 on handwritten digits
	$(BIN)/python examples/train_digits.py

test: .venv/ready  ## every test, doctest and README block
	$(PYTEST)

test-fast: .venv/ready  ## the development loop
	FRESNET_DEVELOPMENT_LOOP=1 $(PYTEST) -m "not slow and not long"

test-oldest: .venv-oldest/ready  ## what runs eagerly, on the oldest PyTorch, two minutes
	$(OLDEST) tests/versions.py eager transforms training

test-long: .venv/ready  ## what repeats at greater length: an hour
	$(PYTEST) -m long

lint: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready  ## the site of these documents, in docs/_build: two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -W --keep-going -n -q docs docs/_build

release: .venv/ready  ## wheel and sdist in dist, built and checked; nothing is uploaded
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[release]'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

bench: .venv/bench  ## against others that run or train a ResNet, five minutes
	$(BIN)/python benchmarks/run.py

bench-full: .venv/bench  ## all sizes and settings, an hour; writes docs/performance.md
	$(BIN)/python benchmarks/run.py --full

bench-gpu: .venv/bench  ## inference and training on a GPU; writes docs/performance.md
	rm -f docs/performance_gpu.json
	$(BIN)/python benchmarks/gpu.py --full --record docs/performance_gpu.json
	$(BIN)/python benchmarks/run.py --report

.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-oldest/ready: tests/oldest.txt tests/without_cuda.py
	$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	$(OLDEST) -m pip install --quiet --no-deps --requirement tests/oldest.txt
	$(OLDEST) tests/without_cuda.py
	touch $@
