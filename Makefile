# Every target works on a fresh machine and from any folder: make -C <here> test
# VENV=... puts the virtual environment elsewhere, PYTHON=... makes it with another interpreter. ARGS=... goes to the
# program that a target runs: pytest for the tests, else the module, such as ARGS="--kills 5" for reliability.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.moe3d-setup

.PHONY: help setup lint test test-full test-golden-full coverage mutants reliability fuzz model-card demo native verify-tensorrt clean

help:
	@echo "make setup             virtual environment in $(VENV), pinned dependencies, editable install"
	@echo "make lint              ruff and mypy"
	@echo "make test              all tests but those on the full-size model: minutes"
	@echo "make test-full         the tests on the full-size model: minutes, several GB of memory"
	@echo "make test-golden-full  of those, the comparison with the golden files"
	@echo "make coverage          what the tests run of the code, into benchmarks/results and docs/testing.md"
	@echo "make mutants           whether the tests notice small changes of the code, likewise: most of an hour"
	@echo "make reliability       the survival matrix, kill and fuzz campaigns, docs/reliability.md: about an hour"
	@echo "make fuzz              of those, the fuzz campaign"
	@echo "make model-card        judge moe3d-tiny, compare heads on it, docs/model_card.md: most of an hour"
	@echo "make demo              moe3d-tiny to depth of scenes it has never seen, beside the truth, in demo/"
	@echo "make native            the expert-mix kernels as a library for PyTorch on CUDA; needs nvcc"
	@echo "make verify-tensorrt   with TensorRT and a GPU: engines with and without the plugin, run, compared, timed"
	@echo "make clean             remove what builds, tests and the demo left; $(VENV) stays"

setup: $(STAMP)

# The stamp lies in the environment, so it goes when that goes. pip without an environment to run in means that
# none is there or that making it was interrupted.
$(STAMP): setup.cfg constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --constraint constraints.txt torch
	$(PY) -m pip install --constraint constraints.txt --editable '.[export,cpu,rtx,train,viz,bench,dev]'
	@touch $@

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: setup
	$(PY) -m pytest -q -m "not full" $(ARGS)

test-full: setup
	$(PY) -m pytest -q -m full $(ARGS)

test-golden-full: setup
	$(PY) -m pytest -q -m full -k golden $(ARGS)

coverage: setup
	$(PY) -m moe3d_deploy.benchmarks.coverage_report --out benchmarks/results/coverage.json $(ARGS)
	$(PY) -m moe3d_deploy.benchmarks.tables

mutants: setup
	$(PY) -m moe3d_deploy.benchmarks.mutants --out benchmarks/results/mutation.json $(ARGS)
	$(PY) -m moe3d_deploy.benchmarks.tables

# A fuzzer is needed by nothing else, so no extra brings it.
reliability: setup
	$(PY) -m pip install --quiet --constraint constraints.txt atheris
	$(PY) -m moe3d_deploy.benchmarks.reliability --out benchmarks/results/reliability_cpu.json $(ARGS)
	$(PY) -m moe3d_deploy.benchmarks.tables

fuzz: setup
	$(PY) -m pip install --quiet --constraint constraints.txt atheris
	$(PY) -m moe3d_deploy.benchmarks.reliability --out benchmarks/results/reliability_cpu.json --only fuzz $(ARGS)
	$(PY) -m moe3d_deploy.benchmarks.tables

# The scenes are the same on every machine, so the card's figures can be checked by anyone. Pictures first: they are quick.
model-card: setup
	rm -rf docs/model_card
	$(PY) -m moe3d_deploy eval moe3d-tiny --scenes test-kinds --count 1 --pictures docs/model_card
	$(PY) -m moe3d_deploy.benchmarks.quality moe3d-tiny --out benchmarks/results/quality_tiny.json
	$(PY) -m moe3d_deploy.benchmarks.heads moe3d-tiny --out benchmarks/results/heads_tiny.json --pictures docs/model_card \
	    --height 84 --width 112 $(ARGS)
	$(PY) -m moe3d_deploy.benchmarks.tables

demo: setup
	$(PY) -m moe3d_deploy.benchmarks.demo --out demo

native: setup
	$(PY) -m moe3d_deploy.native build $(ARGS)

# TensorRT comes with the extra trt, or with NVIDIA's own packages, which VENV then has to see.
verify-tensorrt: setup
	$(PY) -m moe3d_deploy.benchmarks.verify_tensorrt $(ARGS)

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find moe3d_deploy export engines benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
