# Set up, run, check and test, each with one command on a fresh machine with Python >= 3.11 and pip.
# Another Python has an environment of its own: `make test PYTHON=python3.12` uses .venv-python3.12.

PYTHON ?= python3
VENV := .venv$(if $(filter python3,$(notdir $(PYTHON))),,-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# On a machine with NVIDIA GPUs, JAX comes with CUDA.
EXTRAS := $(if $(shell command -v nvidia-smi 2>/dev/null),[cuda])

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
PYTEST_ARGS ?=

BENCHMARKS := planning_speed large_model compile_time step_overhead
SEARCH_BENCHMARKS := search_speed heuristics paper_grid
COMPILER_BENCHMARKS := pipeline_memory large_pipeline executors memory_accuracy
HOST_BENCHMARKS := pipeline_time time_accuracy

.PHONY: help quickstart test test-all test-verify test-gpu check lint types imports format docs bench bench-search bench-galvatron bench-gpu-compiler bench-two-hosts clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

quickstart: $(VENV)/.installed ## train a small GPT on this machine's devices, plan and all
	$(BIN)/galvatron-jax train configs/quickstart.toml

test: $(VENV)/.installed-test ## the suite without its slow matrices
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test ## the whole suite on virtual devices
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-verify: $(VENV)/.installed-verify $(VENV)/.installed-test ## what compiles by XLA's GPU compiler, without a GPU
	$(PYTEST) -m "not slow and not gpu" tests/verify tests/cli/test_verify.py $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-test ## what needs a GPU
	GALVATRON_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: lint types imports docs ## lint, format, types, import order, docs (`make -k check` reports all faults)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-dev ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev ## build the documentation into docs/_build/html
	rm -rf docs/reference/modules
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html

bench: $(VENV)/.installed ## every benchmark at its default size, claims checked
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py --check; done

bench-search: $(VENV)/.installed ## searches of large spaces: their speed, and what they find
	@set -e; for name in $(SEARCH_BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

bench-gpu-compiler: $(VENV)/.installed-verify ## memory by XLA's GPU compiler, for GPUs that need not be here
	@failed=0; for name in $(COMPILER_BENCHMARKS); do \
	  echo "== $$name"; JAX_PLATFORMS=cpu $(BIN)/python benchmarks/$$name.py --check || failed=1; \
	done; exit $$failed

bench-two-hosts: $(VENV)/.installed ## predicted against measured steps on two hosts of one core each (root, for a link of their own)
	@failed=0; for name in $(HOST_BENCHMARKS); do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py --check || failed=1; \
	done; exit $$failed

bench-galvatron: $(VENV)/.installed ## plans against Hetu-Galvatron's: give its files by PROFILES=DIR PLANS=DIR
	$(BIN)/python benchmarks/search_vs_galvatron.py --profiles $(PROFILES) --plans $(PLANS) --check

clean: ## remove environments, caches and built files
	rm -rf .venv .venv-* docs/_build docs/reference/modules .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The environment is made without ensurepip, which Debian's Python lacks: the outer pip (>= 22.3) installs the inner
# one. Dependency groups need pip >= 25.1.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("galvatron-jax needs Python >= 3.11, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet "pip>=25.1"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.$(EXTRAS)'
	@touch $@

$(VENV)/.installed-verify: $(VENV)/.installed
	$(PIP) install --quiet --editable ".[verify]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --group test
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --group dev
	@touch $@
