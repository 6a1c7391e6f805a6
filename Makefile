# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo quick test test-all gpu-env gpu-rehearsal gpu-cache sanitize lint format install bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      install, then run the main job on what the repository ships"
	@echo "make quick     the oracle on the PyTorch backend, models and commands end to end (a minute or two on 2 cores)"
	@echo "make test      install, then run the everyday tests (CPU, under 6 minutes on 2 cores)"
	@echo "make test-all  everything: slow suites, GPU marks where there is a GPU, Triton 3.4, 3.6 and 3.9"
	@echo "make sanitize  small kernel tests under compute-sanitizer (a GPU and the CUDA toolkit)"
	@echo "make gpu-cache compiles the GPU suite's kernels for another machine; also gpu-env, gpu-rehearsal"
	@echo "make bench     CPU ratios of the attention backends (benchmarks/cpu_attention.py)"
	@echo "make lint      ruff check and format check"

install: $(STAMP)

# Beside the environment, for the register budget of a common older compiler (tests/kernels/test_aot.py).
OLD_TRITON := 3.6.0
# And for a part of the integration's tests on the transformers that LLaMA-Factory takes (tests/hf/test_oldest_version.py).
OLD_TRANSFORMERS := 5.5.4

$(STAMP): setup.py requirements.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@test -e $(VENV)/triton-$(OLD_TRITON)/triton/__init__.py || $(BIN)/python -m pip install \
	  --disable-pip-version-check --quiet --no-deps --target $(VENV)/triton-$(OLD_TRITON) \
	  "triton==$(OLD_TRITON); platform_system == 'Linux'"
	@test -e $(VENV)/transformers-$(OLD_TRANSFORMERS)/transformers/__init__.py || $(BIN)/python -m pip install \
	  --disable-pip-version-check --quiet --no-deps --target $(VENV)/transformers-$(OLD_TRANSFORMERS) \
	  "transformers==$(OLD_TRANSFORMERS)" "tokenizers==0.22.2" "huggingface_hub<2"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/sar-fast demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Files, not a marker: what a first look needs is told in one place, and new tests in them count at once.
QUICK := $(addprefix tests/, test_reference.py test_backends.py test_torch_backend.py test_varlen.py test_kvcache.py \
  test_visibility.py test_module.py test_errors.py hf/test_families.py hf/test_batching.py hf/test_generate.py \
  training/test_gradients.py training/test_packing.py evaluation/test_benchmark.py test_cli.py test_whole_way.py)
quick: $(STAMP)
	$(PYTEST) -m "not slow and not gpu" -k "not composed and not triton" $(QUICK)

test: $(STAMP)
	$(PYTEST) --benchmark-disable -m "not slow and not gpu" tests benchmarks

test-all: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation "deepspeed>=0.17" ninja
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --benchmark-disable benchmarks
	$(BIN)/python tests/acceptance/triton_versions.py

# Each tensor its own allocation, so that overruns show. initcheck (SANITIZERS=initcheck) also reports PyTorch's copies.
SANITIZERS ?= memcheck racecheck synccheck
SMALL      := fp16-float16 or padded or window-both or two-row-tiles or test_packed_equals or test_paged_equals or test_append
sanitize: $(STAMP)
	@command -v compute-sanitizer || { echo "compute-sanitizer is not on the path; it comes with the CUDA toolkit"; exit 1; }
	@$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no GPU: these tests would be interpreted'"
	for tool in $(SANITIZERS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 \
	    $(BIN)/python -m pytest tests/kernels -x -m "not slow and not gpu" -k "$(SMALL)" || exit 1; \
	done

# The software of a machine with a GPU, without one: benchmarks/README.md
GPU_PYTHON       ?= python3.12
GPU_VENV         ?= .venv-gpu
GPU_TORCH        ?= 2.11.0
GPU_TRITON       ?= 3.6.0
GPU_TRANSFORMERS ?= 5.17.0
GPU_NUMPY        ?= 2.5.2
GPU_STAMP        := $(GPU_VENV)/.installed
gpu-env: $(GPU_STAMP)
$(GPU_STAMP): Makefile
	@test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check -q torch==$(GPU_TORCH) triton==$(GPU_TRITON) \
	  transformers==$(GPU_TRANSFORMERS) numpy==$(GPU_NUMPY) accelerate pillow pytest pytest-xdist hypothesis typer rich
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps --target $(GPU_VENV)/interpreter "numpy<2.4"
	@touch $(GPU_STAMP)

# Triton 3.6's interpreter, which stands in for the GPU here, breaks on NumPy 2.4; compiled kernels do not care.
gpu-rehearsal: $(GPU_STAMP)
	PYTHONPATH=$(CURDIR)/$(GPU_VENV)/interpreter $(GPU_VENV)/bin/python benchmarks/gpu.py --rehearse \
	  --out results/gpu-rehearsal

gpu-cache: $(GPU_STAMP)
	$(GPU_VENV)/bin/python benchmarks/gpu.py --build-cache results/gpu-carry

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu_attention.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache
