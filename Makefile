# Two commands for a newcomer: `make demo` and `make test`. Every target does only what is left to do.
#
#   PYTHON=python3.12 make demo    another interpreter (3.10 or newer) for a new .venv
#   TORCH=torch make demo          another torch than the one coterie is developed with

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv

PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check
TOOLS := $(VENV)/.tools-installed
BUILT := $(VENV)/.coterie-built
SANITIZED := build/sanitize
EMULATED := build/emulate
TRITON := build/triton
NATIVE_TESTS ?= $(wildcard tests/native tests/test_experts.py tests/test_ops.py tests/test_tickets.py tests/test_tickets_in_processes.py tests/test_cpu.py tests/test_formats.py tests/checkpoints)
NATIVE := $(shell find native -type f) CMakeLists.txt pyproject.toml

.PHONY: help demo test kernels bench develop lint sanitize emulate clean

help:
	@echo "make demo      build coterie in $(VENV) and show it at work (coterie quickstart)"
	@echo "make test      run the test suite"
	@echo "make kernels   the tests of Triton's kernels, interpreted and compiled; make test runs them too"
	@echo "make bench     measure the README's speed tables on this machine"
	@echo "make develop   build coterie in $(VENV), editable"
	@echo "make lint      ruff and mypy"
	@echo "make sanitize  the native tests under ASan and UBSan"
	@echo "make emulate   the native tests on AVX-VNNI, AVX512 and AMX, emulated on any CPU that has AVX2"
	@echo "make clean     remove $(VENV) and every build output"

demo: $(BUILT)
	$(VENV)/bin/coterie quickstart

test: $(BUILT) kernels
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal tests

# In processes of their own: Triton, where there is one, is imported by every process that has torch, which takes a second.
kernels: $(BUILT) $(TRITON)
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON) $(PY) -m pytest -n 2 tests/gpu/test_kernels.py tests/gpu/test_token_kernels.py tests/gpu/test_machine_code.py

bench: $(BUILT)
	PATH="$(abspath $(VENV)/bin):$$PATH" bash benchmarks/tables.sh

develop: $(BUILT)

# Without the site module the editable install is not seen, and the sanitized build is imported in its place.
# --capture=sys leaves the sanitizers' reports on the terminal.
sanitize: $(BUILT)
	$(PIP) install -q --no-build-isolation --no-deps --upgrade --target $(SANITIZED)/site \
	  -C build-dir=$(SANITIZED)/native -C cmake.define.COTERIE_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=1 \
	PYTHONPATH="$(SANITIZED)/site:$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(PY) -S -m pytest --capture=sys -n 2 --dist worksteal $(NATIVE_TESTS)

emulate: $(BUILT)
	$(PIP) install -q --no-build-isolation --no-deps --upgrade --target $(EMULATED)/site \
	  -C build-dir=$(EMULATED)/native -C cmake.define.COTERIE_EMULATE=ON .
	OMP_NUM_THREADS=1 PYTHONPATH="$(EMULATED)/site:$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(PY) -S -m pytest -n 2 --dist worksteal $(NATIVE_TESTS)

lint: $(BUILT)
	$(PY) -m ruff check
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "coterie needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' \
	  || { echo "Python's C headers are missing: install your system's python3-dev (or python3-devel) package" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null \
	  || { echo "There is no C++ compiler '$(firstword $(CXX))': install your system's g++ (or gcc-c++) package, or name one: make CXX=clang++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip -q --python $(PY) install pip; }

$(TOOLS): | $(PY)
	$(PIP) install -q '$(TORCH)'
	$(PIP) install -q 'scikit-build-core>=0.10' 'nanobind>=2.4' cmake ninja
	@touch $@

$(TRITON):
	$(PIP) install -q --no-deps --target $@.partial 'triton>=3.6' && mv $@.partial $@

$(BUILT): $(TOOLS) $(NATIVE)
	$(PIP) install -q --no-build-isolation -e '.[dev]'
	@touch $@
