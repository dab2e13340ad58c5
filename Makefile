# `make demo` and `make test` set everything up; `make help` lists the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PARALLEL := -n auto --dist worksteal  # one worker for each usable core
SOURCES := src tests benchmarks scripts run.py  # not a user's own files beside them

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: help setup demo test test-browser test-cpus test-slow lint type format bench bench-page bench-gpu calibrate results figures docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv with pinned packages (about 6 GB)

demo: $(READY)  ## train and attack a k-WTA network on real digits
	$(BIN)/python run.py experiment=digits

lint: $(READY)  ## ruff: style and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

type: $(READY)  ## mypy --strict
	$(BIN)/mypy

test: lint type  ## lint, types, tests: what CI runs
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not slurm and not network and not browser"

test-browser: $(READY)  ## look at reports in Chromium, which the distribution has to provide
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[browser,tensorboard,mlflow]'
	$(BIN)/python -m pytest -m browser

test-cpus: $(READY)  ## the same tests as on each kind of CPU that this one can emulate
	$(BIN)/python -m tests.cpus $(PARALLEL)

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

format: $(READY)  ## let ruff rewrite
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(READY)  ## time k-WTA, training, attacks and evaluation against baselines (12 min)
	$(BIN)/python -m benchmarks

bench-page: $(READY)  ## the same, and docs/performance.md
	$(BIN)/python -m benchmarks --page

bench-gpu: $(READY)  ## what k-WTA costs on a CUDA device, and docs/performance_gpu.md (at most 10 min)
	$(BIN)/python -m benchmarks.gpu

calibrate: $(READY)  ## the verdict's thresholds and errors (hours, by two processes; wants FashionMNIST)
	$(BIN)/python -m benchmarks.calibration --processes 2

results: $(READY)  ## docs/results.md from the records in docs/results/, and the table of checks in docs/verdict.md
	$(BIN)/python -m scripts.study page
	$(BIN)/python -m scripts.verdict

docs: $(READY)  ## site/: the documentation as pages that open without a network
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

figures: $(READY)  ## docs/figures/ from the records in docs/results/
	$(BIN)/python -m scripts.figures

clean:  ## remove the environment and caches, never outputs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
