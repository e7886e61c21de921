PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Other versions than those that the project's figures were made with: make CONSTRAINTS= TORCH='torch==2.11.*'
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

# PyPI's Linux wheel of torch brings gigabytes of CUDA libraries. Without an NVIDIA driver the CPU build of PyTorch's own
# index is taken where that answers: pip ranks 2.13.0+cpu above 2.13.0, and the pin matches both. To decide yourself:
# `make TORCH_INDEX=URL`, or `make TORCH_INDEX=` for the configured index alone.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || $(PYTHON) -c \
	'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=3); print("$(CPU_INDEX)")' 2>/dev/null)

.DEFAULT_GOAL := help
# Software OpenGL, with which MuJoCo renders without a screen or a GPU.
SIM_PACKAGES := libegl1 libegl-mesa0 libgles2 libgl1 libgl1-mesa-dri libosmesa6
SIM := $(VENV)/.sim
DOCS := $(VENV)/.docs
MUTATION := $(VENV)/.mutation
ROBOT := build/robot
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help install sim demo test test-sim check docs dist robot bench mutate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install the package with what its tests need

sim: $(SIM) ## add the simulator of benchmarks/closed_loop: Meta-World, MuJoCo and Debian's OpenGL libraries

demo: $(INSTALLED) ## compile, verify and run the small trained policy of the package into build/demo
	rm -rf build/demo && mkdir -p build
	$(BIN)/evla demo --out build/demo

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-sim: $(SIM) ## run the tests that need the simulator
	$(BIN)/python -m pytest tests/benchmarks/test_closed_loop.py

check: $(INSTALLED) ## lint, check the formatting, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS) ## build the documentation into build/site; any warning is an error
	$(BIN)/python -m typer evla_compile.cli utils docs --name evla --output docs/reference/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(INSTALLED) ## build the wheel into dist
	rm -rf dist && $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

robot: dist demo ## run the demo's artifact from the wheel in an environment without torch
	rm -rf $(ROBOT) && $(PYTHON) -m venv $(ROBOT)
	$(ROBOT)/bin/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) \
		numpy pillow tokenizers onnxruntime rich typer
	$(ROBOT)/bin/python -m pip install --disable-pip-version-check --no-deps dist/*.whl
	! $(ROBOT)/bin/python -c 'import torch' 2>/dev/null
	$(ROBOT)/bin/evla run build/demo --image evla_compile/data/demo_policy/demo/door-open.png --instruction 'open the door'

bench: $(INSTALLED) ## time compilation, export and inference of the demo policy
	$(BIN)/python -m benchmarks.compile_and_export

mutate: $(MUTATION) ## put small faults into the code, one at a time, and count those that tests notice, for an hour
	nice -n 19 $(BIN)/python -m benchmarks.mutation $(MUTATE)

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch goes first and alone, so that the extra index is asked for nothing else.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX)) '$(TORCH)'
	$(PIP) -e '.[cpu,dev]' '$(TORCH)'
	touch $@

$(DOCS): $(INSTALLED)
	$(PIP) -e '.[cpu,dev,docs]'
	touch $@

$(SIM): $(INSTALLED)
	dpkg -s $(SIM_PACKAGES) >/dev/null 2>&1 || { $(AS_ROOT) apt-get update && \
		$(AS_ROOT) apt-get install -y --no-install-recommends $(SIM_PACKAGES); } || { \
		echo "install your system's packages of EGL and OSMesa (Debian: $(SIM_PACKAGES)), then make sim again"; exit 1; }
	$(PIP) -e '.[cpu,dev,sim]'
	touch $@

$(MUTATION): $(INSTALLED)
	$(PIP) -e '.[cpu,dev,mutation]'
	touch $@
