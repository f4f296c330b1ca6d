# Everything runs in .venv, which `make setup` makes from pyproject.toml and constraints.txt. Start with `make demo`.
#
# PYTHON=python3.12   the interpreter to make .venv with (default: the first of python3, python3.13 ... 3.10 that fits)
# TORCH_INDEX=<url>   PyTorch's index of CPU builds (see the "Get started" page of PyTorch). It is used only where there
#                     is no NVIDIA driver: the default Linux build brings gigabytes of CUDA libraries along.
# ARGS="..."          is handed on to the program, for instance: make demo ARGS="trainer.max_steps=50"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Threads that wait for each other spin a shorter while than OpenMP's default: on a machine with nothing else to do that
# costs nothing, beside one busy process it is several times faster.
export GOMP_SPINCOUNT ?= 10000

PY := .venv/bin/python
PIP = $(PY) -m pip install $(PIP_FLAGS) --disable-pip-version-check
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
STAMP := .venv/.installed
TORCH_VERSION := 2.13.0
LOWEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# A terminal gets pip's progress bars, a log file gets only what went wrong.
PIP_FLAGS ?= $(shell test -t 2 || echo --quiet)
TORCH_FLAGS := $(if $(TORCH_INDEX),$(shell command -v nvidia-smi >/dev/null || echo --extra-index-url $(TORCH_INDEX)))
FITS := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

.PHONY: help setup demo test test-slow test-lowest lint format bench results lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the tested versions of everything (some minutes, about 2 GB)

$(PY):
	@python=""; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c '$(FITS)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: none of these is a Python from 3.10 to 3.13 with the modules venv and ensurepip: $(PYTHONS)." \
	    "Install one (on Debian or Ubuntu with its python3-venv), or name it: make setup PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "Making .venv with $$("$$python" --version)"; \
	"$$python" -m venv .venv

# PYTHONWARNINGS: setuptools prints a frightening warning about every editable install; errors still show.
$(STAMP): pyproject.toml setup.py constraints.txt | $(PY)
	@echo "Installing the versions of constraints.txt into .venv; the first time takes some minutes"
	$(PIP) --constraint constraints.txt --upgrade pip setuptools wheel
	PYTHONWARNINGS=ignore $(PIP) --constraint constraints.txt --build-constraint constraints.txt $(TORCH_FLAGS) \
	  --editable ".[dev]"
	@touch $@

demo: setup ## Train and evaluate on the built-in mini benchmark, end to end, on a CPU
	$(PY) train.py $(ARGS)

test: setup ## Run the tests, without the slow ones
	$(PY) -m pytest $(ARGS)

test-slow: setup ## Run the slow tests: several processes, real training
	@$(PY) -m pytest -m slow $(ARGS) || { \
	  code=$$?; [ $$code -eq 5 ] || exit $$code; echo "No slow test was selected: nothing to run."; }

# A second environment over the first: what it does not hold itself is found there.
test-lowest: setup ## Run the tests of the encoders with the oldest release of transformers that pyproject.toml allows
	$(PY) -m venv .venv-lowest
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > .venv-lowest/lib/$$(ls .venv-lowest/lib)/site-packages/newest.pth
	.venv-lowest/bin/python -m pip install $(PIP_FLAGS) --disable-pip-version-check transformers==$(LOWEST)
	.venv-lowest/bin/python -c 'import transformers; assert transformers.__version__ == "$(LOWEST)", transformers'
	.venv-lowest/bin/python -m pytest tests/encoders tests/test_module.py $(ARGS)
	.venv-lowest/bin/python -m pytest tests/golden/test_mm_embed_vectors.py $(ARGS)

lint: setup ## Check style, types and spelling
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/typos

format: setup ## Rewrite the code in the house style
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: setup ## Measure the training throughput against a bare loop
	$(PY) -m benchmarks.throughput $(ARGS)

results: setup ## Run what docs/results.md shows of the stages, three seeds (hours; goes on where it was killed)
	$(PY) -m benchmarks.evidence $(ARGS)

# One lock for Python 3.10 to 3.13 on every platform, used as constraints. What torch brings for a GPU is left out:
# each build of torch names its own.
lock: | $(PY) ## Write constraints.txt anew from pyproject.toml
	$(PY) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	echo "torch==$(TORCH_VERSION)" > build/lock/torch.txt
	printf '%s\n' pip setuptools wheel > build/lock/build.txt
	{ echo "# The tested versions, for Python 3.10 to 3.13; GPU libraries are left out, torch names its own."; \
	  echo "# Written by \`make lock\`, which runs, with torch==$(TORCH_VERSION) in torch.txt and pip, setuptools, wheel in build.txt:"; \
	  echo "#   uv pip compile --universal --python-version 3.10 --all-extras -c torch.txt pyproject.toml build.txt"; \
	  UV_PYTHON_DOWNLOADS=never build/lock/bin/uv --quiet pip compile --universal --python-version 3.10 --all-extras \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	    -c build/lock/torch.txt pyproject.toml build/lock/build.txt \
	  | grep -Ev '^(cuda-|nvidia-|triton=|httpx2-jsfetch=)'; } > build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt

clean: ## Remove .venv, builds and caches; logs/ and data/ stay
	rm -rf .venv .venv-lowest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
