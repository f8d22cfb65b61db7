# `make check` is what CI runs. Every target works in a fresh clone: it makes the environment it needs.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
# Tests ask no hub. One thread per worker: two workers on two cores are faster than four threads that wait for one another.
ONE    := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo test slow lint format docs docs-check bench check clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/expunge demo --out runs/demo

test: $(STAMP)
	$(ONE) $(BIN)/pytest -n 2

slow: $(STAMP)
	$(BIN)/pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python docs/generate.py

docs-check: $(STAMP)
	$(BIN)/python docs/generate.py --check

bench: $(STAMP)
	for name in steps npo_reference audit_pass extraction_likelihood tofu_eval; do $(BIN)/python benchmarks/$$name.py || exit 1; done

check: lint docs-check test

clean:
	rm -rf runs build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
