# Everything happens in a virtual environment of its own; `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
# Tests are shared out among as many processes, of one thread each: they are too small to gain by a second one.
WORKERS ?= 2
TESTS := -m pytest --numprocesses $(WORKERS) --dist worksteal
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help setup quickstart test test-newest lint typecheck layers bench lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

define new_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedbe needs Python 3.11 or newer; give one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(1)
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call new_environment,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## create the virtual environment and install fedbe into it

quickstart: setup  ## fine-tune the small model with ten clients and show what it learned and kept
	$(BIN)/fedbe fit --config configs/quickstart.yaml

test: setup  ## run the tests in two processes, or: make test WORKERS=8
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(BIN)/python $(TESTS)

# Everything but torch, whose newest release may come with gigabytes of CUDA libraries: give another one by TORCH=.
test-newest:  ## run the tests with the newest releases there are, and show all warnings
	rm -rf $(VENV)-newest
	$(call new_environment,$(VENV)-newest)
	echo 'torch==$(TORCH)' > $(VENV)-newest/torch.txt
	$(VENV)-newest/bin/python -m pip install --quiet --constraint $(VENV)-newest/torch.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(VENV)-newest/bin/python $(TESTS) -W default

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# callbacks/ and datamodules/ are mapped into the package: what is checked as a whole is an installed copy.
define installed_copy
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
endef

typecheck: setup  ## check types
	$(installed_copy)
	cd build/typecheck && $(abspath $(BIN))/mypy --strict --config-file ../../pyproject.toml fedbe

layers: setup  ## check which package imports which, types included
	$(installed_copy)
	cd build/typecheck && $(abspath $(BIN))/lint-imports --no-cache --no-logo ../../pyproject.toml

bench: setup  ## measure overhead and memory of a run on this machine
	$(BIN)/fedbe bench overhead
	$(BIN)/fedbe bench memory
	$(BIN)/fedbe bench fedit

lock:  ## write the newest releases that go together into constraints.txt; torch stays, or: make lock TORCH=2.14.0
	$(call new_environment,$(VENV)-lock)
	$(VENV)-lock/bin/python -m pip install --quiet uv
	echo 'torch==$(TORCH)' > $(VENV)-lock/torch.txt
	$(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest \
		--no-header --no-annotate --extra dev --constraint $(VENV)-lock/torch.txt \
		--output-file $(VENV)-lock/all.txt pyproject.toml
	{ grep '^#' constraints.txt; grep -vE '^(cuda|nvidia|triton)\b' $(VENV)-lock/all.txt; } > $(VENV)-lock/constraints.txt
	mv $(VENV)-lock/constraints.txt constraints.txt

clean:  ## remove the virtual environments and build leftovers; runs stay
	rm -rf $(VENV) $(VENV)-lock $(VENV)-newest build
