# make book    execute the chapters and build the book        make help    what else there is
# Everything is installed into .venv the first time, and again only when pyproject.toml or requirements.lock changes.

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
PROFILE ?= reader
SHELL   := /bin/bash

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# torch comes first and is not in the lock: which build of it suits depends on the machine. Its CUDA packages go with it.
NOT_LOCKED := ^(torch|triton|nvidia-|cuda-|pytorch-triton)

.DEFAULT_GOAL := help
.PHONY: help install book verify reference test peers lint lock clean

help:
	@echo "make book [PROFILE=smoke|reader|paper]  execute the chapters (what changed) and build the book"
	@echo "make verify                             execute the chapters and compare numbers and verdicts with data/reference"
	@echo "make reference                          write those of the executed chapters to data/reference"
	@echo "make test                               run the tests (the browser's need a built book and chromium)"
	@echo "make peers                              install the field's trainers and run the tests that use them"
	@echo "make lint                               check the style of library, tests and notebooks"
	@echo "make lock                               resolve pyproject.toml into requirements.lock"
	@echo "make clean                              remove the built book and executed chapters, not the runs"
	@echo "variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=$(TORCH)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "No '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" || \
	  { echo "Could not make $(VENV). On Debian and Ubuntu the package python3-venv is needed." >&2; exit 1; }
	"$(BIN)/python" -m pip install --quiet 'pip>=24'
	"$(BIN)/python" -m pip install --quiet "$(TORCH)"
	"$(BIN)/python" -m pip install --quiet -r requirements.lock
	"$(BIN)/python" -m pip install --quiet --no-deps -e .
	@touch $@

# Only one build at a time, guarded by a lock that ends with the process. Snakemake's own lock survives an interruption and
# would have to be removed by hand (--nolock); a chapter that was cut off is executed again (--rerun-incomplete).
SNAKEMAKE = python .ci/exclusively.py .snakemake/book.lock \
  snakemake --cores all --nolock --rerun-incomplete --rerun-triggers mtime params code input \
    --config profile=$(PROFILE) --quiet host --nocolor
book: $(VENV)/.installed
	@$(SNAKEMAKE)
	@python -c 'from pathlib import Path; page = Path("_build/html/index.html"); print(f"The book: {page}  ({page.resolve().as_uri()})")'

# What is missing is computed, what is kept is not computed again: in a fresh clone, everything.
verify: $(VENV)/.installed
	@$(SNAKEMAKE) chapters
	@prefdyn verify --profile $(PROFILE)

reference: $(VENV)/.installed
	@prefdyn reference

test: $(VENV)/.installed
	@python -m pytest -rs

# Beside the lock: the book needs none of these, and most tests do not.
peers: $(VENV)/.installed
	"$(BIN)/python" -m pip install --quiet -c requirements.lock -e '.[peers]'
	@python -m pytest -rs tests/test_peers.py tests/test_callback.py tests/test_callback_trl.py tests/test_folders.py \
	  tests/test_afterwards.py tests/test_lens_cli.py tests/test_precision.py tests/test_sharded.py

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	lint-imports --no-cache > /dev/null || lint-imports --no-cache
	@shopt -s nullglob; files=(notebooks/*.ipynb); \
	  if (( $${#files[@]} )); then nbstripout --keep-id --verify "$${files[@]}"; fi

lock: | $(VENV)
	@test -x "$(BIN)/uv" || "$(BIN)/python" -m pip install --quiet uv
	@echo "$(TORCH)" > "$(VENV)/torch.txt"
	uv pip compile --quiet --universal --no-header --no-annotate --upgrade --extra book --extra dev \
	  --constraint "$(VENV)/torch.txt" pyproject.toml -o "$(VENV)/all.txt"
	@grep -Ev '$(NOT_LOCKED)' "$(VENV)/all.txt" > requirements.lock
	@echo "requirements.lock: $$(grep -c == requirements.lock) packages"

$(VENV):
	"$(PYTHON)" -m venv "$(VENV)"

clean:
	rm -rf _build book/notebooks book/_values .snakemake
