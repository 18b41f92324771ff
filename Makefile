# The only place where commands are spelled out. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named after the content of what is installed: a checkout or a tool may update a file's time without changing the file.
INSTALLED := requirements.lock pyproject.toml setup.py tools/install.py
READY := $(VENV)/ready-$(shell cat $(INSTALLED) | cksum | cut -d ' ' -f 1)
# No usage data is sent to anybody.
export MLFLOW_DISABLE_TELEMETRY ?= true

## Use it

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^## / {printf "\n%s\n", substr($$0, 4)} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup ## Run the example: flights_etl, then flights_train, through Airflow in one process
	@$(BIN)/mlpkg run flights_etl flights_train

demo: setup ## Simulate three months: data, predictions, monitor, and a training when its alarm fires
	@rm -rf var/demo
	@MLPKG_PROFILE=demo $(BIN)/mlpkg simulate --from 2013-10 --to 2013-12

serve: setup ## Serve the champion's predictions over HTTP: http://127.0.0.1:8001/docs
	@$(BIN)/mlpkg serve

test: setup ## Run everything that checks the project
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/python docs/measure.py
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/pytest

lab: setup ## Open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --ip 127.0.0.1 --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter nbs

mlflow: setup ## Open the MLflow UI on the runs made here: http://127.0.0.1:5000
	@$(BIN)/mlpkg ui mlflow

airflow: setup ## Open the Airflow UI, with scheduler, on the same database and DAGs: http://127.0.0.1:8080
	@$(BIN)/mlpkg ui airflow

## Work on it

setup: $(READY) ## Make the virtual environment from requirements.lock

$(READY):
	@rm -f $(VENV)/ready*
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else f"Python {sys.version.split()[0]} is not supported: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) from requirements.lock; this takes a minute or two once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install.py
	@touch $(READY)

prepare: setup ## Clean the notebooks, export the package, write README.md, test
	@$(MAKE) --no-print-directory clean-notebooks export readme test

export: setup ## Export nbs/ to mlpkg/
	@$(BIN)/nbdev-export

clean-notebooks: setup ## Remove noise from the notebooks
	@$(BIN)/nbdev-clean

readme: setup ## Write README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

pages: setup ## Measure the library notebooks against the limits of CONTRIBUTING.md
	@$(BIN)/python docs/measure.py

docs: setup ## Build the documentation site into _docs/
	@$(BIN)/python docs/build.py

docs-serve: docs ## Read the documentation site: http://127.0.0.1:8000
	@$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _docs

bench: setup ## Measure, side by side: training, batch predictions, the API
	@$(BIN)/python bench/train.py
	@$(BIN)/python bench/batch.py
	@$(BIN)/python bench/serve.py

bench-steps: setup ## Measure what a step costs, in all ways to run one; with Celery where VALKEY_URL and DATABASE_URL are set
	@$(BIN)/python bench/steps.py

bench-peers: setup ## Measure what a step costs with other tools, each in an environment of its own
	@$(BIN)/python bench/peers.py

alarms: setup ## Measure how often the alarm of the monitor is false, and what it finds (an hour; ONLY="no truth": a part)
	@$(BIN)/python bench/alarms.py $(if $(ONLY),--only "$(ONLY)")

targets: setup ## Measure everything that has a target, part by part (two hours), and print the table
	@$(BIN)/python bench/targets.py

mutants: setup ## Change code that decides, a little and in one place at a time, and count what the tests notice (hours)
	@$(BIN)/python bench/mutants.py

hooks: setup ## Let git merge and diff notebooks cell by cell, and refuse those with noise or conflicts
	@git config --local core.hooksPath .githooks
	@git config --local merge.jupyternotebook.name nbdev-merge
	@git config --local merge.jupyternotebook.driver "'$(CURDIR)/$(BIN)/nbdev-merge' %O %A %B %P"
	@git config --local diff.jupyternotebook.command "'$(CURDIR)/$(BIN)/nbdev-diff-driver'"

lock: setup ## Refresh requirements.lock from pyproject.toml
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade --quiet --output-file requirements.lock

build: setup ## Build wheel and source distribution into dist/
	@$(BIN)/python -m build --no-isolation

## Production

up: ## Build the image and start the stack of docker-compose.yml
	@test -f .env || $(PYTHON) docker/env.py
	@GIT_COMMIT=$$(git rev-parse HEAD) docker compose up --detach --build --wait

down: ## Stop the stack; its data stays
	@docker compose down

smoke: ## Bring up a separate stack, run DAGs in it, check what they left and that the API answers, remove the stack
	@docker/smoke.sh

env: ## Write .env with fresh secrets for docker-compose.yml
	@$(PYTHON) docker/env.py

.PHONY: help run demo serve test lab mlflow airflow setup prepare export clean-notebooks readme pages docs docs-serve bench bench-steps bench-peers alarms targets mutants hooks lock build up down smoke env
