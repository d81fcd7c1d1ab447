# Needs Python >= 3.10, a C++ compiler and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt $(shell find csrc -type f)

.PHONY: setup demo test test-isas test-compat test-vllm fuzz bench bench-save report bench-compare gpu sanitize lint format dist clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]' --constraint constraints.txt -Ccmake.define.VLMKERN_EMULATE_AMX=ON
	touch $@

demo: setup
	$(BIN)/vlmkern demo

test: setup
	$(BIN)/python -m pytest

# the op tests for each instruction set that the CPU has; those below AVX512_BF16 as on CPUs where torch has no bfloat16
# products either, the last with a cache of its own: torch 2.13 loads what it compiled for one vector width for another, and
# corrupts memory; and attention and its pooling by AMX's kernels on plain C++
AS_AVX512 := VLMKERN_CPU_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE
AS_AVX2 := VLMKERN_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
  TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor_avx2)
OP_TESTS := tests/ops $(foreach name,cpu_products packing native_properties fuzz,tests/test_$(name).py)
test-isas: setup
	set -e; \
	run() { echo "== $$*"; env "$$@"; }; \
	for isa in $$($(BIN)/python -c "import vlmkern; n = vlmkern.backends()['native']; print(*(i for i in n['isas'] if i != n['isa']))"); do \
	  case $$isa in \
	    avx512) run $(AS_AVX512) $(BIN)/python -m pytest -q $(OP_TESTS);; \
	    avx2) run $(AS_AVX2) $(BIN)/python -m pytest -q $(OP_TESTS);; \
	    *) run VLMKERN_CPU_ISA=$$isa $(BIN)/python -m pytest -q $(OP_TESTS);; \
	  esac; done; \
	run VLMKERN_CPU_ISA=amx_emulated $(BIN)/python -m pytest -q tests/ops/attention tests/ops/attention_pool tests/test_native_properties.py

# the transformers tests with the oldest version that is supported, installed beside the others
COMPAT := build/compat
$(COMPAT)/.installed: pyproject.toml | $(STAMP)
	rm -rf $(COMPAT)
	$(BIN)/python -m pip install --quiet --no-deps --target $(COMPAT) \
	  'transformers==4.57.*' 'huggingface_hub>=0.34,<1.0' 'tokenizers>=0.22,<=0.23.0' 'kernels==0.10.*'
	touch $@

test-compat: setup $(COMPAT)/.installed
	PYTHONPATH=$(COMPAT) $(BIN)/python -m pytest tests/test_transformers_*.py tests/test_picture_efficiency.py

# the vLLM plugin's tests, in an environment of their own (2.6 GB): vLLM's CPU build pins what it needs
VLLM_VENV := .venv-vllm
VLLM_PYTHON := $(VLLM_VENV)/bin/python
$(VLLM_VENV)/.installed: pyproject.toml tests/vllm/install.py $(NATIVE)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PYTHON) -m pip install --quiet packaging
	$(VLLM_PYTHON) tests/vllm/install.py
	$(VLLM_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -Cbuild-dir=build/vllm --editable .
	touch $@

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_PYTHON) -m pytest tests/vllm

# random calls of every op under every instruction set, judged against float64: make fuzz [N=] [SEED=] [OP=] [ISA=]
N ?= 10000
SEED ?= 0
fuzz: setup
	$(BIN)/python -m tests.fuzz --cases $(N) --seed $(SEED) $(if $(OP),--op $(OP)) $(if $(ISA),--isa '$(ISA)')

# make bench [AS=AVX2] [ONLY=expression]: as on a CPU of AVX2, or of AVX512 without bfloat16; cases as by pytest's -k
bench: setup
	mkdir -p bench/out
	$(AS_$(AS)) $(BIN)/python -m pytest bench --benchmark-only --benchmark-json=bench/out/latest.json --quiet $(if $(ONLY),-k '$(ONLY)')
	$(BIN)/python bench/report.py bench/out/latest.json
	$(AS_$(AS)) $(BIN)/python bench/rule.py bench/out/latest.json

# keeps the last `make bench` as bench/results/<cpu>-<date>.json and makes the documents' tables from all of them
bench-save: setup
	$(BIN)/python bench/records.py save bench/out/latest.json
	$(BIN)/python bench/records.py tables

# bench/report/: pictures, Markdown and one HTML page, from the last `make bench` (run if there is none)
report: setup
	test -f bench/out/latest.json || $(MAKE) bench
	$(BIN)/python bench/make_report.py

# one-thread CPU time against another revision, built beside this one; fails on 5 %: make bench-compare BASE=main
bench-compare: setup
	$(BIN)/python bench/compare.py $(BASE) $(if $(ONLY),--only '$(ONLY)')

# numbers, times and tuning on a GPU, with the machine's own Python and torch: nothing is installed or downloaded;
# docs/gpu.md says what the minutes give. make gpu [MINUTES=30] [GPU_OPTIONS='--steps numerics,bench']
GPU_PYTHON ?= python3
MINUTES ?= 30
gpu:
	$(GPU_PYTHON) bench/gpu.py --minutes $(MINUTES) $(GPU_OPTIONS)

# the op tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set
sanitize: setup
	cmake -S . -B build/sanitize -DVLMKERN_SANITIZE=ON -DVLMKERN_EMULATE_AMX=ON -DCMAKE_BUILD_TYPE=Debug \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/sanitize --parallel $$(nproc)
	$(BIN)/python tests/sanitize.py build/sanitize

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# an sdist, and a wheel built from that sdist
dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist bench/out bench/report
