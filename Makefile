# `make` lists what there is. The variables below can be set on the command line:
#   make test                       # creates .venv, installs what is missing, builds, runs the tests
#   make test VENV= PYTHON=python3  # uses that Python as it is: installs nothing, needs no network

PYTHON ?= python3
VENV ?= .venv
# Pinned: on Linux the newest torch brings gigabytes of CUDA libraries along.
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?=
OUT ?= build/gpu-check

TEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
COUNTS_ARGS ?=
CUDA_CHECK_ARGS ?=
MUTATIONS_ARGS ?=
EMULATE_ARGS ?=
SANITIZE_TESTS ?= tests/ops

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
PY_SCRIPTS := $(shell command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
needs = preflight
else
PY := $(VENV)/bin/python
PY_SCRIPTS := $(abspath $(VENV))/bin
needs = $(foreach group,$(1),$(VENV)/.installed-$(group))
endif
# torch looks for ninja on PATH, also when its Python was not activated.
export PATH := $(PY_SCRIPTS):$(PATH)
export PYTHON

CXX_FILES = $(shell find csrc benchmarks tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips must not write to one environment.
.NOTPARALLEL:
.PHONY: help preflight build test test-models demo bench lint format sanitize mutations emulate \
	counts cuda-check cuda-build dist-check gpu-check clean

help:  ## list the targets
	@echo 'Targets:'
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) (empty: use PYTHON as it is) TORCH=$(TORCH)'
	@echo '  TEST_ARGS, DEMO_ARGS, BENCH_ARGS, COUNTS_ARGS, CUDA_CHECK_ARGS, MUTATIONS_ARGS,'
	@echo '  EMULATE_ARGS, SANITIZE_TESTS: passed on'
	@echo '  CUDA_TORCH=$(CUDA_TORCH) CUDA_VENV (an existing environment for cuda-build) OUT=$(OUT)'

preflight:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "No $(PYTHON) found: install Python 3.10 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
		{ echo "No C++ compiler ($${CXX:-c++}) found: install one (Debian: apt install g++)"; exit 1; }

# The stamp files keep a second call from asking pip again.
$(VENV)/pyvenv.cfg: | preflight
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment \
	(Debian: apt install python3-venv); or name one that has torch: make VENV= PYTHON=..."; \
	rm -rf $(VENV); exit 1; }

$(VENV)/.installed-torch: $(VENV)/pyvenv.cfg
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install $(TORCH)
	@touch $@

$(VENV)/.installed-%: pyproject.toml tools/extras.py $(VENV)/.installed-torch
	$(PY) tools/extras.py $* > $@.txt
	$(PY) tools/extras.py torch > $(VENV)/.torch.txt
	$(PY) -m pip install --quiet --constraint $(VENV)/.torch.txt -r $@.txt
	@touch $@

# torchrec requires the CUDA build of what is installed here for the CPU, fastai what nobody uses here.
$(addprefix $(VENV)/.installed-,torchrec fastai): $(VENV)/.installed-%: \
		pyproject.toml tools/extras.py $(VENV)/.installed-models
	$(PY) tools/extras.py $* > $@.txt
	$(PY) -m pip install --quiet --no-deps -r $@.txt
	@touch $@

build: $(call needs,build) | preflight  ## compile the extension in place
	$(PY) setup.py build_ext --inplace

test: build $(call needs,test)  ## run the tests
	$(PY) -m pytest $$($(PY) tools/pytest_options.py) $(TEST_ARGS)

test-models: build $(call needs,test models torchrec fastai)  ## swap the lookups of real models
	$(PY) -m pytest $$($(PY) tools/pytest_options.py) tests/models $(TEST_ARGS)

demo: build $(call needs,bench)  ## train skip-gram with nn.Embedding and with this one
	PYTHONPATH=. $(PY) examples/train_skipgram.py $(DEMO_ARGS)

bench: build $(call needs,bench)  ## run the benchmarks
	$(PY) -m benchmarks $(BENCH_ARGS)

lint: $(call needs,build test bench dev)  ## check style and types
	ruff check .
	ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run -Werror $(CXX_FILES)

format: $(call needs,dev)  ## rewrite the sources in the house style
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

sanitize: $(call needs,build test)  ## run the op tests under the address and undefined sanitizers
	PYTHON=$(PY) tools/sanitize.sh $(SANITIZE_TESTS)

mutations: build $(call needs,test bench)  ## make mistakes in a copy: which does no test notice?
	$(PY) tools/mutations.py $(MUTATIONS_ARGS)

emulate: $(call needs,build test)  ## run the CUDA kernels on a CPU; needs the headers of nvcc, no GPU
	$(PY) tests/emulator/run.py $(EMULATE_ARGS)

counts: $(call needs,build bench)  ## count what the CUDA kernels move, on that CPU; nothing is timed
	$(PY) -m benchmarks.counts $(COUNTS_ARGS)

cuda-check: $(call needs,build cuda-check)  ## compile and read every CUDA file; needs nvcc, no GPU
	$(PY) tools/check_cuda.py $(CUDA_CHECK_ARGS)

cuda-build: preflight  ## build against a CUDA torch and test that; needs nvcc, 12 GB, no GPU
	CUDA_TORCH='$(CUDA_TORCH)' CUDA_VENV='$(CUDA_VENV)' tools/cuda_build.sh

dist-check: $(call needs,build)  ## build the wheel and the sdist, and try both
	$(PY) tools/check_packages.py

gpu-check: preflight  ## on a GPU: build, tests, compute-sanitizer, benchmarks; uses PYTHON as it is
	OUT='$(OUT)' tools/gpu_check.sh

clean:  ## remove what was built; VENV stays
	rm -rf build dist *.egg-info embed_ext/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
