# `make demo` and `make test` need Python 3.11 or newer and make; each sets up everything else in .venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test test-full check format clean

demo: .venv/user
	$(BIN)/switchback run configs/demo.yaml

test: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-full: .venv/dev
	$(BIN)/python -m pytest -m full -s

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/user: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing switchback and what it needs into .venv (a few minutes the first time)"
	@if $(BIN)/pip show --quiet switchback 2>/dev/null; then $(BIN)/pip uninstall --quiet --yes switchback; fi # its name until 0.1
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/user
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
