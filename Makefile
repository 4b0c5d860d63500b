# make repro        the main job: curate, base, sft, train, evaluate, report; ends with a results table
# make experiments  everything that params/experiment.yaml lists (JOBS=2: two arms at a time; compute.slots by default)
# make test         no network, no GPU, minutes;  make test-slow: full sizes;  make check: ruff and types
# make audit        known weaknesses of the pinned packages (pip-audit; needs a network, says so where there is none)
# make bench        a training step and its scaling beside the serial reference and bounds: minutes, best on an idle machine;
#                   WRITE=1 puts the tables into docs/benchmarks/
# make ui           MLflow's pages;  make lock-status: what is stale;  make clean: caches and logs, never results
#
# Every target sets up what it needs. Python 3.11 or newer and gcc are all that must be there: PYTHON=python3.12 make repro.

PYTHON ?= python3
SCALE ?= tiny
JOBS ?=
PORT ?= 5000

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# `python` in dvc.yaml is the environment's, and nothing calls home.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export METAFLOW_USER ?= $(if $(filter-out root,$(USER)),$(USER),unigrpo)
export DVC_NO_ANALYTICS := 1
export ITERATIVE_DO_NOT_TRACK := 1
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PYTHONHASHSEED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

DVC := .venv/bin/dvc --wait-for-lock
TEST := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 .venv/bin/python -m pytest -q

BENCH := MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 .venv/bin/python

.PHONY: help venv store repro experiments smoke test test-slow check audit bench ui lock-status clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

venv: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %s; name one with PYTHON=..." % sys.version.split()[0])'
	@echo "setting up .venv: minutes, and about 2 GB"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --progress-bar off -c constraints.txt -e '.[evaluation,cluster,dev]'
	@touch $@

# MLflow's database: made, or brought to this version, before stages share it. A source tree without git works too.
store: .unigrpo/store.stamp

.unigrpo/store.stamp: .venv/.stamp
	@test -e .git || .venv/bin/dvc config --quiet --local core.no_scm true
	@.venv/bin/unigrpo store
	@touch $@

# Base and warm-up are evaluated beside the training, which is one process. `dvc repro` does the same, one after another.
repro: store
	@$(DVC) status --quiet --with-deps report@$(SCALE)-main || { $(DVC) repro sft@$(SCALE) && \
	  .venv/bin/unigrpo experiment run --scale $(SCALE) --show --only $(SCALE)-unigrpo-0 $(SCALE)-base $(SCALE)-sft && \
	  $(DVC) repro report@$(SCALE)-main; }
	@.venv/bin/unigrpo report --scale $(SCALE)

experiments: repro
	@.venv/bin/unigrpo experiment run --scale $(SCALE) $(if $(JOBS),--jobs $(JOBS))
	@$(DVC) repro
	@.venv/bin/unigrpo report --scale $(SCALE) --which experiments

smoke: .venv/.stamp
	@.venv/bin/python tests/pipeline_copy.py

# A test that hangs for ten minutes ends the run, with where it stood.
test: .venv/.stamp
	@$(TEST) -n 2 --dist loadfile --max-worker-restart=0 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true -m "not slow and not gpu"

test-slow: .venv/.stamp
	@$(TEST) -m "slow and not gpu"

check: .venv/.stamp
	@.venv/bin/ruff check .
	@.venv/bin/mypy

# 0: nothing found, or nothing could be asked, which it says; 1: findings, which docs/security.md answers.
audit: .venv/.stamp
	@.venv/bin/python tests/audit.py constraints.txt

bench: .venv/.stamp
	@mkdir -p build/bench; rm -f build/bench/*; status=0; page=$(if $(WRITE),docs/benchmarks/training_step.md,build/bench/bench.md); \
	json=$(if $(WRITE),docs/benchmarks/training_step,build/bench/training_step); \
	$(BENCH) benchmarks/training_step.py --scale tiny --json $$json.json --write $$page || status=1; \
	$(BENCH) benchmarks/training_step.py --scale tiny --prompts 8 --group 16 --json $${json}_8x16.json --write $$page || status=1; \
	for scale in small $$(.venv/bin/python -c 'import torch; print("bagel_7b" * torch.cuda.is_available())'); do \
	  $(BENCH) benchmarks/training_step.py --scale $$scale --repeats 2 --json $${json}_$$scale.json --write $$page || status=1; \
	done; \
	$(BENCH) benchmarks/scaling.py --repeats 3 --json $${json}_scaling.json --write $$page || status=1; \
	$(BENCH) benchmarks/startup.py --write $(if $(WRITE),docs/benchmarks/startup.md,$$page) || status=1; \
	echo "written to $$page"; exit $$status

ui: store
	@.venv/bin/unigrpo store
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --default-artifact-root $(CURDIR)/mlartifacts --port $(PORT)

lock-status: .venv/.stamp
	@$(DVC) repro --quiet code
	@$(DVC) status

clean:
	rm -rf .unigrpo .metaflow flows/.metaflow .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find unigrpo flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
