# Everything a developer or a new user runs. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
CORE := $(wildcard src/kvrouter_grpc/*/*.pyx src/kvrouter_grpc/core/*.pxd src/kvrouter_grpc/core/*.h src/kvrouter_grpc/core/vendor/*.h)
BUILD := pyproject.toml setup.py $(CORE)

# Other inputs each day; the run prints the seed.
FUZZ_SEED ?= $(shell date +%Y%m%d)

.DEFAULT_GOAL := help
.PHONY: help build dev demo test fuzz sanitize soak test-vllm vllm-env lint format proto proto-check config-docs clean \
	bench bench-quick bench-docs bench-peers bench-traces bench-fleet

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(VENV)/.built ## The router and its compiled core, into .venv
dev: $(VENV)/.dev ## The same with everything tests and checks need

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.built: $(BUILD) | $(VENV)/bin/python
	@echo "building the router (about a minute the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(BUILD) clients/python/pyproject.toml clients/prefill_handler/pyproject.toml | $(VENV)/bin/python
	@echo "building the router and installing the development tools (about two minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --editable clients/python --editable clients/prefill_handler
	@touch $@ $(VENV)/.built

demo: $(VENV)/.built ## Router, four mock workers, real decisions and streams; ends by itself
	$(BIN)/kvrouter demo

test: $(VENV)/.dev ## The whole suite without real engines
	$(BIN)/pytest -m "not vllm" $(ARGS)

fuzz: $(VENV)/.dev ## A million damaged KV frames and a million damaged requests, others each day (FUZZ_SEED=...)
	KVROUTER_FUZZ_SEED=$(FUZZ_SEED) KVROUTER_FUZZ_FRAMES=1000000 KVROUTER_FUZZ_REQUESTS=1000000 \
		$(BIN)/pytest tests/fuzz $(ARGS)

sanitize: $(VENV)/.dev ## The compiled modules under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tools/sanitize.py $(ARGS)

soak: $(VENV)/.dev ## Ten minutes of a bad network between workers and router, with figures (ARGS="--minutes 2")
	PYTHONPATH=tests:src $(BIN)/python -m robustness.soak $(ARGS)

vllm-env: ## Real vLLM engines for the CPU, in environments of their own under .cache
	$(PYTHON) tools/vllm_env.py

test-vllm: $(VENV)/.dev vllm-env ## The suite against real vLLM engines on the CPU
	$(BIN)/pytest -m vllm tests/e2e $(ARGS)

lint: $(VENV)/.dev ## Style, types, import directions, contract, generated files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy -p kvrouter_client -p kvrouter_prefill
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory proto-check
	$(BIN)/python tools/gen_config_docs.py --check

format: $(VENV)/.dev ## Apply the formatter and what the linter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(VENV)/.dev ## Generate the stubs from proto/
	$(BIN)/python tools/gen_proto.py

proto-check: $(VENV)/.dev ## Lint the contract, compare it with the released one, compare the stubs
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/released.binpb
	$(BIN)/python tools/gen_proto.py --check

config-docs: $(VENV)/.dev ## Generate the tables of docs/configuration.md
	$(BIN)/python tools/gen_config_docs.py

bench: $(VENV)/.built bench-peers ## Cost of everything beside the peers and the limit; bench/results/latest.json
	$(BIN)/python -m bench $(ARGS)

bench-quick: $(VENV)/.built ## Every suite at tiny sizes, to see that it works
	$(BIN)/python -m bench --quick --no-peers $(ARGS)
	$(BIN)/python -m bench.traces --quick

bench-traces: $(VENV)/.built ## Routing policies on recorded traffic over simulated engines, see docs/routing.md
	$(BIN)/python -m bench.traces $(ARGS)

bench-fleet: $(VENV)/.dev vllm-env ## Routing policies on two real vLLM engines on the CPU, about twenty minutes
	PYTHONPATH=tests:src $(BIN)/python -m bench.fleet $(ARGS)

bench-docs: $(VENV)/.built bench-peers ## Plots and tables of the pages, from the last runs of the others
	$(BIN)/python -m bench.curves $(ARGS)
	.cache/bench/plots/bin/python -m bench.plots
	$(BIN)/python -m bench.page
	.cache/bench/plots/bin/python -m bench.traces.plots
	$(BIN)/python -m bench.traces.page

bench-peers: $(VENV)/.built ## Environments of the peers and of the plots, below .cache/bench
	$(BIN)/python -m bench.peers

clean: ## Remove what was built, environments included
	rm -rf $(VENV) .cache build dist src/kvrouter_grpc/*/*.so src/kvrouter_grpc/*/*.c
	find . -name __pycache__ -prune -exec rm -rf {} +
