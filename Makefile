# make demo   make the environment and a 60-second video
# make test   make the environment and run all tests
# make lint   check the style

PYTHON ?= python3
VENV ?= .venv
# How to install torch, if the choice below does not suit: make demo PIP_TORCH_ARGS="torch==2.13.0"
PIP_TORCH_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGE := $(VENV)/.package-is-installed
TOOLS := $(VENV)/.tools-are-installed

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

# One thread: two are a third faster on two idle cores (47 frames/s, not 35), and crawl where another program uses one.
demo: $(PACKAGE)
	@out=runs/lost-and-found; n=2; \
	while [ -e "$$out" ]; do out=runs/lost-and-found-$$n; n=$$((n + 1)); done; \
	$(BIN)/slotmemory generate examples/lost-and-found.yaml --threads 1 --out "$$out"

test: $(TOOLS)
	$(BIN)/python -m pytest -n 2 $(TEST_ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "slotmemory needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# On Linux the default package index serves torch with several GB of CUDA; without a GPU the CPU build is taken: from
# where pip looks anyway, should it have one (its version ends in +cpu), else by uv, which knows where CPU builds are.
$(PACKAGE): pyproject.toml | $(BIN)/python
	@set -e; \
	if $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	elif [ -n '$(PIP_TORCH_ARGS)' ]; then $(PIP) install --quiet $(PIP_TORCH_ARGS); \
	elif [ "$$(uname -s)" != Linux ]; then echo "Installing torch ..."; $(PIP) install --quiet 'torch>=2.8'; \
	elif nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	    echo "Installing torch for the GPU ..."; $(PIP) install --quiet 'torch>=2.8'; \
	else \
	    echo "Installing torch for the CPU (no GPU found) ..."; \
	    $(PIP) install --quiet 'torch==2.13.0+cpu' 2>/dev/null || \
	    { $(PIP) install --quiet uv && \
	      $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=cpu 'torch>=2.8'; }; \
	fi
	@echo "Installing slotmemory ..."
	@$(PIP) install --quiet --editable .
	@touch $@

$(TOOLS): $(PACKAGE)
	@$(PIP) install --quiet --editable '.[dev,quant,wan]'
	@touch $@
