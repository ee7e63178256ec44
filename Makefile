# make demo: sixteen agents learn on real digits.   make test: lint, formats, types and tests.
# make bench: how fast steps are here, each after a comparison with the reference (THREADS=2 make bench).
# All set up .venv themselves; they need Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*) python/gut_fast/rules.py
CPP := $(wildcard csrc/*.h $(foreach end,h cpp cu cuh,csrc/*/*.$(end)) tests/emulation/*.h tests/emulation/*.cpp)

.PHONY: demo test bench lint format types check clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python -m gut_fast.study.demo

test: lint types check

bench: .venv/installed
	$(BIN)/pytest benchmarks --benchmark-sort=name

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: .venv/installed
	$(BIN)/mypy

check: .venv/installed
	$(BIN)/pytest

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

.venv/installed: $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable ".[cli,dev]"
	touch $@

clean:
	rm -rf .venv build dist outputs .mypy_cache .ruff_cache .hypothesis
