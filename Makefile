# `make help` lists the targets.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# numba notices a changed file, but not a changed kernel that another file has compiled in: a cache
# per state of the kernels' sources.
KERNELS := $(shell cat pool/hbm_pool/host/*.py policy/hbm_policy/*.py sim/hbm_sim/*.py | cksum | cut -d' ' -f1)
export NUMBA_CACHE_DIR ?= $(HOME)/.cache/hbm-partition/numba/$(KERNELS)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types imports unit study e2e e2e-full bench clean

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## virtual environment with the pinned set
$(STAMP): pyproject.toml constraints/py311.txt
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 (set PYTHON=...)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints/py311.txt -e '.[dev]'
	touch $@

demo: install ## the whole system on this machine, under load, in a few minutes
	$(BIN)/hbm demo $(ARGS)

test: lint types imports unit ## lint, types, import contracts and all tests

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

unit: install
	$(BIN)/pytest -n 2 --dist loadfile --durations 20 $(ARGS)

study: install ## every arm of the study once on short streams, in a few minutes
	$(BIN)/hbm eval --suite smoke --strict --budget 15 --out out/study $(ARGS)

# Root, Go and Debian packages are needed, or a cluster of yours: docs/development.md, "End to end".
e2e: install ## the system on a real three-node Kubernetes on this machine
	$(BIN)/pytest e2e/tests -m "not e2e_full" $(ARGS)
	@echo "e2e: the commands of docs/kubernetes.md hold on a real cluster"

e2e-full: install ## the same, and kill -9 and power cuts of every part
	$(BIN)/pytest e2e/tests $(ARGS)
	@echo "e2e-full: no request failed that a fault does not explain, and everything converged"

bench: install ## all benchmarks of this machine, as JSON under out/bench
	$(BIN)/hbm bench all --out out/bench

clean: ## remove what a build or a demo leaves behind (not the environment)
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
