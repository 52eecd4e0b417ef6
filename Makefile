# Everything happens in a virtual environment of its own; `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help setup quickstart test lint typecheck bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedbe needs Python 3.11 or newer; give one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## create the virtual environment and install fedbe into it

quickstart: setup  ## fine-tune the small model with ten clients and show what it learned and kept
	$(BIN)/fedbe fit --config configs/quickstart.yaml

test: setup  ## run the tests
	WANDB_MODE=offline $(BIN)/python -m pytest

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup  ## check types, on an installed copy because callbacks/ and datamodules/ are mapped into the package
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && $(abspath $(BIN))/mypy --strict --config-file ../../pyproject.toml fedbe

bench: setup  ## measure overhead and memory of a run on this machine
	$(BIN)/fedbe bench overhead
	$(BIN)/fedbe bench memory
	$(BIN)/fedbe bench fedit

clean:  ## remove the virtual environment and build leftovers; runs stay
	rm -rf $(VENV) build
