# Everything sets itself up: `make demo` and `make test` work on a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process: the tests run side by side, and results must not depend on it.
# Who is done takes over from the others, so that no process sits on a file of slow tests.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# Processes that tests start find the modules compiled, whatever the caller says of that.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest $(PARALLEL)

# Most of what a change breaks, in a minute: the format, the method, checkpoints, recipes.
QUICK := tests/patch_spec tests/erasure tests/checkpoints tests/test_increments.py \
	tests/test_recipe.py tests/test_places.py tests/test_arguments.py tests/test_api.py tests/test_promised.py

.PHONY: setup demo test quick lint types contract vectors site check mutants newest clean

setup: $(READY)

$(READY): pyproject.toml examples/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,artwork]' --editable ./examples
	touch $@

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(PYTEST) $(ARGS)

quick: $(READY)
	$(PYTEST) -q -m "not slow" --durations=0 --durations-min=5 $(QUICK)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

contract: $(READY)
	$(BIN)/lint-imports

vectors: $(READY)
	$(BIN)/python -m patch_spec.make_vectors --check

site: $(READY)
	$(BIN)/mkdocs build -d build/site

check: lint types contract vectors test

# How many small faults in the format and the method their tests notice; see docs/mutation.md.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mutmut==3.8.1
	nice $(BIN)/python -m tests.mutation.run $(ARGS)

# To be run every week: the quick tests with the newest releases of what we lean on most, whatever
# pyproject.toml allows (pip says where it does not), in an environment of its own. torch stays.
NEWEST := build/newest
LIBRARIES := diffusers transformers safetensors typer rich huggingface_hub

newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,artwork]' --editable ./examples
	grep '^torch==' constraints.txt >$(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --constraint $(NEWEST)/torch.txt --upgrade $(LIBRARIES)
	$(NEWEST)/bin/python -c 'import sys, importlib.metadata as m; print(*(f"{n} {m.version(n)}" for n in sys.argv[1:]), sep="\n")' torch $(LIBRARIES)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest $(PARALLEL) -m 'not slow' $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
