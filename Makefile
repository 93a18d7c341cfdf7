# make run    merge the embedded pool of eight models, adapt, score, report
# make test   run all tests, JOBS of them at a time
# make test-transformers4   run those that depend on transformers' version with transformers 4.57, and fusion_bench's program, whose
#             task pools need that version, in .venv-transformers4
# make bench  measure time, memory and start-up beside a plain model and fusion-bench; ARGS=--help says how
# make lint   style and types
# make clean  remove the environment and the caches; what runs wrote to outputs/ is yours and stays
# Each makes .venv where it is missing and installs what it needs, in the tested versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2
TRANSFORMERS4 := .venv-transformers4
VERSIONED := tests/contract tests/parity tests/e2e/test_fusion_bench.py tests/unit/test_clip.py tests/unit/test_lora.py tests/unit/test_merged.py \
	tests/unit/test_model_pool.py tests/unit/test_plugin.py tests/unit/test_saving.py tests/unit/test_sources.py tests/unit/test_task_pool.py

.PHONY: run test test-transformers4 bench lint clean

run: $(VENV)/.installed-run
	$(BIN)/fusion_merge $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(ARGS)

test-transformers4: $(TRANSFORMERS4)/.installed
	$(TRANSFORMERS4)/bin/python -m pytest -n $(JOBS) --dist loadscope $(VERSIONED)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(TRANSFORMERS4) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v[:2] < (3, 14) or sys.exit(f"fusion_merge needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[tiny8,plot]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

$(TRANSFORMERS4)/.installed: pyproject.toml constraints-transformers4.txt
	$(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python -m pip install --disable-pip-version-check -q -c constraints-transformers4.txt -e '.[test,upstream]'
	touch $@
