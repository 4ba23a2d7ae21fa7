# `make serve` and `make test` need nothing but Python and make; the rest is installed into .venv, once, with the
# versions of constraints.txt.

PYTHON ?= python3
ARGS ?=
# Processes that run tests, each with servers of its own: some 3 GiB. Most tests leave a core idle.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.docs-installed

# glibc gives freed buffers of this size back to the kernel and faults them in anew, page by page, at every operation.
# Keeping them makes training on a CPU markedly faster.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=500000000

# What was compiled is kept by its sources, for all checkouts of this user: a fresh one need not compile it again.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bdh-batch
export NUMBA_CACHE_DIR ?= $(CACHE)/numba
export TRITON_CACHE_DIR ?= $(CACHE)/triton
# Bytecode is kept, also where the environment says otherwise: without it, each process that runs tests rewrites the
# assertions of all tests and plugins anew, and each program parses the package.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help venv serve test docs clients upstream-servers cluster-check fuzz load format train bench gpu-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## the environment alone, in .venv

# Made again only when what it holds has changed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: $(INSTALLED)  ## serve the bundled model at 127.0.0.1:8000; ARGS="--port 9000" for options
	@exec $(BIN)/bdh-batch serve $(ARGS)

test: $(INSTALLED)  ## the gate: format, lint, types, tests; ARGS="-k name" for pytest, ARGS=--cov for coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# Strict: a broken link or reference fails. What has not changed is not made again.
docs: $(DOCS_INSTALLED)  ## the documentation as a site, in build/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/docs
	@echo 'build/docs/index.html'

# Clients that need different major versions of openai have environments of their own; none has this project in it.
CLIENTS := .venv-clients
CLIENT_GROUPS := openai_2 openai_3

$(CLIENTS)/%/.installed: tests/clients/%/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)/$*
	$(CLIENTS)/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clients: $(INSTALLED) $(CLIENT_GROUPS:%=$(CLIENTS)/%/.installed)  ## other people's clients against the server: docs/compatibility.md
	npm install --prefix tests/clients/node --no-package-lock --no-audit --no-fund --loglevel=error || echo "without Node's" >&2
	@for group in $(CLIENT_GROUPS); do \
	    BDH_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/$$group/bin/pytest -c tests/clients/pytest.ini \
	        tests/clients/$$group $(ARGS) || exit; \
	done

# A Gradio app and a KServe model server, which need other versions of what this project has.
UPSTREAMS := .venv-upstreams

$(UPSTREAMS)/.installed: tests/upstreams/servers/requirements.txt
	$(PYTHON) -m venv $(UPSTREAMS)
	$(UPSTREAMS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

upstream-servers: $(INSTALLED) $(UPSTREAMS)/.installed  ## a gateway before real Gradio and KServe servers: docs/gateway.md
	$(BIN)/pytest tests/upstreams/servers/test_servers.py $(ARGS)

cluster-check: $(INSTALLED)  ## a cluster of Ray whose processes are killed, scaled and refused, about 10 minutes
	$(BIN)/pytest tests/deploy/cluster $(ARGS)

fuzz: $(INSTALLED)  ## 20,000 requests made from /openapi.json, right and wrong ones; CASES=n SEED=n for others
	FUZZ_CASES=$(or $(CASES),20000) FUZZ_SEED=$(or $(SEED),0) $(BIN)/pytest tests/http/test_openapi.py -k breaks $(ARGS)

load: $(INSTALLED)  ## locust's users on a server, up to saturation and beyond; SECONDS=600 USERS=256 for others
	$(BIN)/python -m benchmarks.stress.load --seconds $(or $(SECONDS),600) --users $(or $(USERS),256) $(ARGS)

format: $(INSTALLED)  ## format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(INSTALLED)  ## train a model: TEXT=file OUT=folder, ARGS for more options
	@test -n "$(TEXT)" -a -n "$(OUT)" || { echo 'usage: make train TEXT=shakespeare.txt OUT=models/my-bdh' >&2; exit 2; }
	@exec env $(KEEP_MEMORY) $(BIN)/python examples/train_bdh.py --text "$(TEXT)" --out "$(OUT)" $(ARGS)

bench: $(INSTALLED)  ## measure everything here, about 20 minutes; ARGS="--quick" tries it out in three
	@exec $(BIN)/python -m benchmarks.reports.suite $(ARGS)

# With the Python of the machine: it needs no more than torch, triton, numpy, numba, pytest, safetensors and msgspec.
gpu-check:  ## on a machine with a GPU: test the Triton kernels on it, tune, measure
	@exec $(PYTHON) -m benchmarks.engine.gpu_check $(ARGS)

clean:  ## remove the environment and everything else that can be made again
	rm -rf $(VENV) $(CLIENTS) $(UPSTREAMS) build dist htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf examples/node/node_modules tests/clients/node/node_modules *.egg-info
	find bdh_batch benchmarks docs examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
