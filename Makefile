# `make demo` and `make test` work on a machine with Python >= 3.10 and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# How torch is installed: uv picks the build that fits the machine (CPU wheel unless a GPU is found); where its source of
# builds cannot be reached, the default index decides. Set TORCH to choose yourself, e.g. TORCH="torch==2.13.0".
TORCH ?= torch>=2.8
DEMO := examples/lost-and-found.yaml

.PHONY: demo test lint clean

demo: $(VENV)/.ready
	$(BIN)/slotmemory generate $(DEMO)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "slotmemory needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/python -c 'import torch' 2>/dev/null \
		|| UV_HTTP_TIMEOUT=30 $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto "$(TORCH)" \
		|| $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev,train]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
