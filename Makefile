# Every target sets up what it needs by itself (scripts/bootstrap.py), once.

PYTHON ?= python3
# An active conda environment made from environment.yml is used as it is; otherwise .venv is made.
VENV ?= $(if $(filter nbengine,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)
SEEDS ?= 2000

RUN = $(VENV)/bin/python
SET_UP = @command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here. Install it with: sudo apt install python3 python3-venv" >&2; exit 1; }; \
	$(PYTHON) scripts/bootstrap.py --venv "$(VENV)"

# No more workers than 8: each loads torch. tests/conftest.py shares the cores among them.
PYTEST = $(RUN) -m pytest -n logical --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help demo test lab docs simulate lint format wheel-check clean

help:  ## say what each target does
	@echo "Each target sets up what it needs by itself (.venv, dependencies, the model)."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo:  ## eight conversations batched through paged KV blocks, live in the terminal
	$(SET_UP)
	@$(RUN) -m nbengine.demo

test:  ## everything that must hold: lint, types, tests, 2,000 simulated lives, notebooks, packages
	$(SET_UP) --extras notebook,test
	@$(MAKE) --no-print-directory lint VENV="$(VENV)"
	@echo "== tests, notebooks, packages"
	@$(PYTEST)

# The project is the server's root: the lessons show pictures of docs/ and link to its pages.
lab:  ## JupyterLab, with notebooks/ open
	$(SET_UP) --extras notebook,cuda
	@$(RUN) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

docs:  ## the documentation's site, into build/docs
	$(SET_UP) --extras notebook,docs
	@$(RUN) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "The site is in build/docs: open build/docs/index.html"

simulate:  ## run the scheduler through SEEDS=2000 random lives with faults
	$(SET_UP)
	@$(RUN) -m nbengine.core.lives --seeds $(SEEDS)

lint:  ## ruff (lint and format) and mypy
	$(SET_UP) --extras notebook,test
	@echo "== ruff check"
	@$(RUN) -m ruff check .
	@echo "== ruff format"
	@$(RUN) -m ruff format --check .
	@echo "== mypy"
	@$(RUN) -m mypy

format:  ## let ruff mend lint and format
	$(SET_UP) --extras notebook,test
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

wheel-check:  ## install the built wheel alone in a fresh environment and use it (slow)
	$(SET_UP) --extras notebook,test
	@rm -rf build/wheel-check && mkdir -p build/wheel-check
	@$(RUN) -c "import hatchling.build as b; b.build_wheel('build/wheel-check')"
	@$(PYTHON) scripts/bootstrap.py --venv build/wheel-check/venv --wheel build/wheel-check/*.whl
	@cd build/wheel-check && venv/bin/python -I -m nbengine.demo

clean:  ## remove .venv and everything that was built or cached
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
