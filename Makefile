# What CI runs is what you run: make gen check test bench. `make help` explains every target.
# PYTHON=python3.12 chooses the interpreter of .venv, ARGS="..." goes on to the tool.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
ARGS ?=
# One more than there are cores: most tests wait for processes at times.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))

# A terminal's PATH decides which tools a recipe finds: the project's come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

say = @echo "-- $(strip $(1))"

.PHONY: help
help: ## Explain all targets
	@printf 'Aither. Needs Python 3.11 or later, make, and nothing else.\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nARGS="..." goes on to the tool: make up ARGS="--port-base 7500", make test ARGS="-k fanout".\n'

.PHONY: setup
setup: ## Make .venv with everything in requirements.lock; quick when nothing has changed
	@scripts/setup.sh

.PHONY: up
up: setup ## Start the nervous system and follow its events; Ctrl-C drains and ends it
	@exec $(BIN)/aither up $(ARGS)

.PHONY: test
test: setup ## Run the tests, without those marked interop or slow, on all cores
	@exec $(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: check
check: setup check-code check-imports check-proto check-generated check-k8s ## All that can be said without running it: style, types, floors, protos, manifests
	$(call say,all is well)

.PHONY: check-code
check-code: setup # style, form, types
	$(call say,style: ruff)
	@ruff check --quiet .
	$(call say,form: ruff format)
	@ruff format --quiet --check . || { ruff format --diff . 2>/dev/null | head -50; echo 'run: make format'; exit 1; }
	$(call say,types: mypy --strict)
	@mypy --no-error-summary
	$(call say,installed packages satisfy pyproject.toml)
	@$(PY) -m pip --disable-pip-version-check check >/dev/null || { $(PY) -m pip check; echo 'run: make lock'; exit 1; }

.PHONY: check-imports
check-imports: setup # floors and fences between packages
	$(call say,floors: import-linter)
	@for package in *_svc aither_*; do \
		[ ! -f $$package/__init__.py ] || [ "$$(grep -c "\"$$package\"\|[\" ]$$package[\" ]" pyproject.toml)" -ge 2 ] \
			|| { echo "$$package stands in no contract: add it to [tool.importlinter] in pyproject.toml"; exit 1; }; done
	@out=$$(lint-imports --no-logo 2>&1) || { printf '%s\n' "$$out"; exit 1; }

.PHONY: check-proto
check-proto: setup # lint, form and compatibility of the protos
	$(call say,protos: buf lint)
	@buf lint
	$(call say,protos: buf format)
	@buf format proto --diff --exit-code || { echo 'run: make format'; exit 1; }
	$(call say,protos: buf breaking against the last release)
	@[ -f proto/baseline.binpb ] || { echo 'proto/baseline.binpb is missing; run: make proto-baseline'; exit 1; }
	@buf breaking proto --against proto/baseline.binpb

.PHONY: check-generated
check-generated: setup # generated/ is what the protos say
	$(call say,generated/ is fresh)
	@$(PY) scripts/gen.py --check

.PHONY: check-k8s
check-k8s: setup # the manifests are what a cluster accepts
	@[ ! -d k8s ] || { echo "-- manifests: kustomize and kubernetes-validate"; $(PY) scripts/check_k8s.py; }

.PHONY: gen
gen: setup ## Write generated/ from proto/
	$(call say,generating from proto/)
	@$(PY) scripts/gen.py

.PHONY: format
format: setup ## Bring code and protos into form
	@ruff check --quiet --fix-only . && ruff format --quiet . && buf format proto --write

.PHONY: bench
bench: setup ## Run every benchmark, each beside its peers; names those that failed
	@failed=; for file in benchmarks/bench_*.py; do \
		echo "-- $$file"; \
		module=$${file%.py}; $(PY) -m "$${module//\//.}" $(ARGS) || failed="$$failed $$file"; \
	done; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

.PHONY: interop
interop: setup ## Run the tests against real third-party tools; says what could not be had
	@$(PY) -m tests.interop.tools
	@code=0; $(PY) -m pytest -q -rs -m interop $(ARGS) || code=$$?; \
		if [ $$code -eq 5 ]; then echo 'there are no interop tests to run'; else exit $$code; fi

.PHONY: lock
lock: ## Write requirements.lock from pyproject.toml; ARGS=--upgrade takes newer releases
	@scripts/lock.sh $(ARGS)

.PHONY: proto-baseline
proto-baseline: setup ## At a release: make proto/ what later changes may not break
	@[ ! -f proto/baseline.binpb ] || buf breaking proto --against proto/baseline.binpb
	@buf build proto --as-file-descriptor-set --exclude-source-info --output proto/baseline.binpb
	$(call say,buf breaking compares with proto/ as it is now)

.PHONY: clean
clean: ## Remove .venv, caches and builds; keeps .aither, your data
	@rm -rf $(VENV) .build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
