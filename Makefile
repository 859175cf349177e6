# `make demo` and `make test` need only Python 3.11+, make and a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux, torch comes with CUDA (several GB), which also runs on a CPU. TORCH_INDEX=<address of PyTorch's CPU wheel
# index> saves the download.
TORCH_INDEX ?=
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types stubs clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(INSTALL) --editable '.[dev]'
# TensorRT's type stubs, for mypy alone: installed beside the rest they would ask for TensorRT, and look like it to
# an import. The names that sed mends are no Python.
	$(INSTALL) --no-deps --target $(VENV)/stubs tensorrt-stubs
	sed -i.bak -E 's/, in: /, in_: /; s/channel_axis: int\)/channel_axis: int = ...)/' \
	  $(VENV)/stubs/tensorrt_bindings/tensorrt.pyi
	@touch $@

demo: $(VENV)/.installed ## serve the bundled model, make three clips, write them to out/
	$(BIN)/python -m cinecat.server.demo --out out

test: lint types ## lint, types and tests
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.installed ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout=1800

lint: $(VENV)/.installed ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy follows folders, not package-dir: give it the import tree as links.
types: $(VENV)/.installed ## strict types
	@rm -rf build/typing && mkdir -p build/typing/cinecat
	@ln -s $(addprefix $(CURDIR)/,$(wildcard protos/cinecat/*)) build/typing/cinecat/
	@ln -s $(addprefix $(CURDIR)/,server engines plugins) build/typing/cinecat/
	$(BIN)/mypy -p cinecat

stubs: $(VENV)/.installed ## regenerate the gRPC stubs from the protos
	$(BIN)/python -m tests.protos.stubs protos

clean: ## remove everything that make made
	rm -rf $(VENV) build out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
