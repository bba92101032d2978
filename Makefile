# quickstart, test and check make .venv from requirements.lock when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SHELL := /bin/bash
QUICKSTART ?=
PYTEST ?=

.PHONY: help quickstart test check lock clean

help:  ## this list
	@sed -n -E 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

quickstart: $(INSTALLED)  ## real images to a registered model, in about eight minutes
	$(BIN)/python -m pipelines.quickstart $(QUICKSTART)

test: $(INSTALLED)  ## every test, the slow ones too, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

check: $(INSTALLED)  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports

lock:  ## pin what pyproject.toml asks for, from a fresh environment
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install 'torch==2.13.0' 'mlflow==3.17.2' 'ray[default,train,tune]==2.60.0' '.[dev]'
	.venv-lock/bin/pip freeze --all | grep -v -E '^(bcm|pip) ?[@=]' | sed -E 's/\+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:  ## remove .venv
	rm -rf .venv

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
