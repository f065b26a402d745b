# Loupe's commands. `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
UV ?= uv
# 1: `make demo` ends after the webhook, else it leaves the server running.
ONCE ?=
# Two workers, each with a PostgreSQL of its own; empty: one after the other.
PYTEST_ARGS ?= -n 2

PY := $(VENV)/bin/python
# One line for every tenth package: pip alone is either silent for a minute or endless.
PIP_PROGRESS := awk '/^(Collecting|Processing) / && ++n % 10 == 0 { print "    " n " packages"; fflush() } \
	/^Installing/ { print "    putting them in place"; fflush() }'

##@ Use
.PHONY: demo run worker migrate
demo: $(VENV)/.runtime ## Show what Loupe does, on a sample picture (ONCE=1: and end)
	@exec $(PY) -m demo $(if $(filter 1 yes true,$(ONCE)),--once)

run: migrate ## Run the server, by the settings in the environment
	@exec $(PY) -m app serve

worker: migrate ## Run an extra process that takes what is due (PostgreSQL)
	@exec $(PY) -m app worker

migrate: $(VENV)/.runtime ## Bring the database's schema up to date
	@$(PY) -m app migrate

##@ Develop
.PHONY: test bench profile torture check format lock clean help
test: check ## Install everything, check, and pass all tests
	@echo "==> Tests"
	@$(PY) -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.runtime ## Measure beside the limit and peers (needs wrk; ONLY=upload, ROUNDS, SECONDS)
	@exec $(PY) -m bench $(if $(ONLY),--only $(ONLY)) \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(FILES),--files $(FILES)) $(if $(OUT),--out $(OUT))

profile: $(VENV)/.runtime $(BENCH_VENV)/.tools ## Where the time of one request goes (ONLY=upload)
	@exec $(PY) -m bench.profile --py-spy $(BENCH_VENV)/bin/py-spy \
		$(if $(ONLY),--only $(ONLY)) $(if $(SECONDS),--seconds $(SECONDS))

torture: $(VENV)/.dev ## The reliability tests in their full size (needs strace; takes long)
	@LOUPE_TORTURE=full $(PY) -m pytest -s tests/torture

check: $(VENV)/.dev ## Lint, types and the import contract
	@echo "==> Lint, types, imports"
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: $(VENV)/.dev ## Format the code
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header
lock: ## Pin the newest dependencies that pyproject.toml allows (needs uv)
	@echo "==> Pinning dependencies"
	@$(LOCK) --upgrade pyproject.toml -o requirements.lock
	@$(LOCK) --upgrade --extra dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	@$(LOCK) --upgrade bench/requirements.in -o bench/requirements.lock

clean: ## Remove the virtual environment and all caches; ./data stays
	@rm -rf $(VENV) $(BENCH_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) ":" } \
		/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

# --- set-up, each step once ---------------------------------------------------------------------

INSTALL = $(PY) -m pip install --disable-pip-version-check --no-input --require-hashes

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Loupe needs Python 3.11 or newer; say which: make PYTHON=python3.11 ..."; exit 1; }
	@echo "==> Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: requirements.lock | $(PY)
	@echo "==> Installing the pinned dependencies, about a minute the first time"
	@$(INSTALL) -r requirements.lock | $(PIP_PROGRESS)
	@touch $@

$(VENV)/.dev: requirements-dev.lock | $(PY)
	@echo "==> Installing the pinned dependencies, tests' and tools' too"
	@$(INSTALL) -r requirements-dev.lock | $(PIP_PROGRESS)
	@touch $@

$(BENCH_VENV)/.tools: bench/requirements.lock
	@echo "==> Installing the profiler"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		--require-hashes -r bench/requirements.lock
	@touch $@
