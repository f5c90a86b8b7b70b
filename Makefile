# The two commands a newcomer needs: `make demo` and `make test`. Both set up the environment first.
PYTHON ?= python3
# ON: warnings of the compiler are errors.
WERROR ?= OFF
VENV := .venv
BIN := $(VENV)/bin
# The installed package is a list of the modules in src/: one moved or deleted takes a new list.
MODULES := $(shell find src -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(MODULES)

.PHONY: help setup demo test quick oldest peers lint format symbols sanitize docs clean

help:            ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv, install everything from pyproject.toml, compile the kernels

# Again only when one of these has changed. Built with tools that stay in .venv, not in an environment that pip makes and
# throws away, so that what is compiled in build/ stays good and only what has changed is compiled again.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "setting up in $(VENV), 1 to 5 minutes: 1/3 tools to build with"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check scikit-build-core nanobind cmake ninja
	@echo "2/3 torch and the other packages; 3/3 the kernels, compiled for each instruction set"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	    --no-build-isolation --config-settings=cmake.define.BPTT_WERROR=$(WERROR)
	@rm -f $(VENV)/.installed*
	@touch $@

demo: setup      ## train on real text for a minute or two, sample, say where everything lies
	$(BIN)/bptt demo

test: setup      ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

quick: setup     ## run those that are not marked slow
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not slow'

oldest:          ## run the tests with the lowest versions of torch and NumPy that pyproject.toml allows
	PYTHON=$(PYTHON) cmake/oldest

peers: setup     ## run the adaptors' tests with the frameworks themselves, which it installs in build/peers
	cmake/peers

lint: setup symbols  ## ruff check, ruff format --check, mypy, symbols, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy

format: setup    ## let ruff and clang-format rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

# An inline function of two variants could be linked in the wider one's instructions and run where there are none.
symbols: setup   ## check that the kernels' variants share no code
	@nm -C build/*/CMakeFiles/walks_*.dir/csrc/*.cpp.o > build/symbols
	@! grep -E ' [uVW] ' build/symbols | grep -vE 'bptt::(portable|avx2|avx512)::'

sanitize: setup  ## compile the kernels with GCC's sanitizers, run their tests
	cmake/sanitize

docs: setup      ## build the site in site/, offline: its pictures are made by the code of its pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo site/index.html

clean:           ## remove what setup and the tools made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
