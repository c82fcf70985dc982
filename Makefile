# Every target but gpu and clean sets up what it needs; a second call installs nothing again.
# An active environment (venv or conda) is used, otherwise .venv is made here.
PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENV    := $(or $(ACTIVE),$(CURDIR)/.venv)
BIN    := $(ENV)/bin
STAMP  := $(ENV)/.m3bind-setup
NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)
CONSTRAIN := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
OUT    ?= runs/demo

TRITON36 := $(CURDIR)/.venv-triton36

.PHONY: setup demo test test-all test-triton36 bench gpu support lint format ablation clean help

help:
	@echo "make demo      the whole path on a simulated cohort: $(OUT)/report.html"
	@echo "make test      the tests (make test-all: the slow ones too)"
	@echo "make test-triton36  the Triton kernels with Triton 3.6 and torch 2.11"
	@echo "make bench     the benchmarks against the peers, their table in README.md"
	@echo "make gpu       builds, tests and measures on an NVIDIA GPU, in eight minutes (QUICK=1: two)"
	@echo "make support   docs/support.md out of the operators' tests"
	@echo "make lint      ruff, clang-format, mypy, import layers"
	@echo "make ablation  the demo with three seeds, tabulated"
	@echo "make setup     only install (into $(ENV))"

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "m3bind needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(ENV)

$(STAMP): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(CONSTRAIN) $(BIN)/python -m pip install -q --upgrade pip
	$(CONSTRAIN) $(BIN)/python -m pip install -q --no-compile torch torchvision
	$(CONSTRAIN) $(BIN)/python -m pip install -q --no-compile -e '.[train,bench,dev]'
	@# By all cores, where pip uses one. What does not compile here (packages ship broken files for
	@# tests) is told by whoever imports it.
	@$(BIN)/python -m compileall -qq -j 0 \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
	@touch $@

demo: setup
	$(BIN)/m3bind demo --output $(OUT)

# Two tests at a time, one thread each; the tests of threads set their own number. In the order of
# the files: the longest, Triton's interpreter, would else come last, with nothing beside it. Many
# processes are started, and bytecode that is kept is not compiled anew by each.
test: setup
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-all: setup
	$(BIN)/python -m pytest -q tests

# The oldest Triton that is supported, with its torch; its interpreter knows no numpy 2.4.
$(TRITON36)/.m3bind-setup: Makefile
	$(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/python -m pip install -q "torch==2.11.*" "triton==3.6.*" "numpy<2.4" \
	    pytest pytest-benchmark hypothesis
	@touch $@

test-triton36: $(TRITON36)/.m3bind-setup
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(TRITON36)/bin/python -m pytest -q tests/kernels

# Every part, or those that are named: make bench PARTS="clip topk". On a quiet machine.
bench: setup
	$(BIN)/python benchmarks/run.py $(PARTS)

# All that needs an NVIDIA GPU, recorded under benchmarks/results/<device>; `m3bind results` then
# renders it. It installs nothing: torch, triton, pytest, pytest-benchmark, numpy, cmake, ninja,
# pybind11 and CUDA's compiler are there. QUICK=1: two minutes, into build/gpu-quick. RECORDS=folder:
# written there instead. DEVICE=cpu: the same way without a GPU, at sizes that say nothing.
# M3BIND_COMMIT names the commit of a copy without .git.
gpu:
	$(or $(shell command -v python),$(PYTHON)) benchmarks/gpu.py $(if $(QUICK),--quick) \
	    $(if $(DEVICE),--device $(DEVICE)) $(if $(RECORDS),--out $(RECORDS))

# docs/support.md: what works in which backend, out of the outcomes of the tests.
support: setup
	M3BIND_SUPPORT_TABLE=$(CURDIR)/docs/support.md OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 \
	    --dist loadfile --no-loadscope-reorder -m "not slow" tests/kernels tests/ops
	rm -f docs/support.md.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

ablation: setup
	$(BIN)/python benchmarks/ablation.py

clean:
	rm -rf build dist *.egg-info m3bind/*.so runs
