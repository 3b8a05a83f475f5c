# Each target does its own set-up; see `make help`.
SHELL := /bin/bash
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test device readme lab hooks format clean

help:  ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup:  ## Make or refresh .venv (only when pyproject.toml or constraints.txt changed)
	@bash .ci/setup.sh

demo: setup  ## Drawn scenes: train, evaluate, export, report (about ten minutes on two cores)
	@.venv/bin/neo demo

test: setup  ## Everything that must hold: style, export, imports, notebooks, tests
	@bash .ci/check.sh

device: setup  ## Pack .gpu/ for a bare machine with one NVIDIA GPU; there: bash .gpu/run.sh FOLDER
	@bash .ci/device.sh

readme: setup  ## README.md from nbs/index.ipynb
	@$(PY) .ci/readme.py

lab: setup  ## JupyterLab; begin with nbs/tutorials/explore.ipynb
	@.venv/bin/neo lab

hooks: setup  ## Check before every commit what `make test` would complain of
	@.venv/bin/pre-commit install

format: setup  ## Format notebooks and tests, export, clean, write the parameter cells of run notebooks
	@.venv/bin/ruff format -q nbs tests .ci && .venv/bin/ruff check -q --fix nbs tests .ci
	@.venv/bin/nbdev-export && .venv/bin/nbdev-clean && $(PY) .ci/parameters.py

clean:  ## Remove .venv and caches; data and reports stay
	@rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	@find . -name __pycache__ -prune -exec rm -rf {} +
