# make quickstart | demo | test | test-all | test-oldest | lint | support | notebooks | screenshots | bench-kernels | wheel | clean     PYTHON=python3.11 make ... chooses the interpreter of .venv
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TYPING := build/typing
SLOW := -m "not slow"
# What pyproject.toml calls the oldest supported releases, in an environment of their own.
OLDEST := "torch==2.11.*" "transformers==5.17.*" "numpy<2.4" # newer ones break the interpreter of their triton
JOBS := -n auto --maxprocesses 4

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help .venv quickstart demo test test-all test-oldest support notebooks screenshots bench-kernels lint style typecheck wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n '1s/^# //p' Makefile

.venv: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "installing vtprune and what it needs into .venv (the first time this takes minutes)"
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

quickstart: .venv
	@$(BIN)/python -m vtprune.quickstart

demo: .venv
	@$(BIN)/python -m vtprune demo

test: lint
	$(BIN)/python -m pytest -q --durations=15 $(JOBS) $(SLOW)

# Everything, in both environments.
test-all: SLOW := -m "slow or not slow"
test-all: test test-oldest

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -q $(JOBS) $(SLOW)

.venv-oldest/.installed: pyproject.toml
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@echo "installing vtprune with the oldest supported torch and transformers into .venv-oldest (minutes)"
	@.venv-oldest/bin/python -m pip install --quiet -e ".[dev]" $(OLDEST)
	@touch $@

# The table of methods and families in docs/support.md and README.md.
support: .venv
	@$(BIN)/python -m vtprune.support

# What the notebooks in demos/ put out, saved in them.
notebooks: .venv
	@OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

# docs/img/demo-*.png: the demo in a browser, as its tests leave it.
screenshots: .venv
	VTPRUNE_SCREENSHOTS=$(CURDIR)/docs/img $(BIN)/python -m pytest -q tests/test_demo_browser.py $(SLOW)

# The kernels' times and memory, in benchmarks/results/kernels-<device>.*; refused where their tests fail. BENCH=--cpu-time on a CPU that others use as well.
bench-kernels: .venv
	$(BIN)/python benchmarks/kernels.py --save $(BENCH)

lint: style typecheck

style: .venv
	$(BIN)/ruff check .

# mypy does not follow package-dir: show it the packages as they are imported, through links.
typecheck: .venv
	@rm -rf $(TYPING) && mkdir -p $(TYPING)/vtprune
	@ln -s $(CURDIR)/vtprune/* $(CURDIR)/models $(CURDIR)/kernels $(CURDIR)/demos $(TYPING)/vtprune/
	cd $(TYPING) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p vtprune

# setuptools packs whatever an earlier build left under build/.
wheel: .venv
	@rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find vtprune models kernels demos tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
