# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors

# `make test` and `make demo` need python3 with venv and headers, make and a C++ compiler; the rest
# goes into $(VENV). For another build of torch set TORCH to arguments of pip install.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# extras of pyproject.toml for `make trainers` and `make test-trainers`
TRAINERS ?= trainers
# executes Triton kernels on the CPU; says that it needs a later Python than it does
TTSEM := ttsem==0.1.0
CXX ?= g++

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)  # for ninja
COMPILED := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc benchmarks tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' \
    -o -name '*.cuh')

.PHONY: test test-trainers test-ptxsim demo trainers gallery study bench gpu docs compile-gate lint \
    format sanitize sanitize-cuda clean FORCE

# threads that spin while they wait starve a machine that others use too
test test-trainers test-ptxsim: export OMP_WAIT_POLICY ?= passive
test: build/extension
	$(BIN)/python -m pytest $(TEST_ARGS)

# what marginkernels.compat drops into, with the packages themselves
test-trainers: build/extension $(VENV)/trainers
	$(BIN)/python -m pytest -q tests/compat $(TEST_ARGS)

# the simulator of PTX that `make test` uses; two to three minutes on two cores
test-ptxsim: $(VENV)/package
	$(BIN)/python -m pytest -q tools/ptxsim/tests

demo: build/extension
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# each trainer with its own head and with ours, and the table of docs/trainers.md; some minutes. All
# of them have packages with TORCH=torch==2.14.1 TRAINERS=trainers,oml,speechbrain
trainers: build/extension $(VENV)/trainers
	for script in $(filter-out %/compare.py,$(wildcard examples/trainers/*.py)); do \
	    $(BIN)/python $$script --record && $(BIN)/python $$script --record --steps 6 --classes 100000 || exit; \
	done
	$(BIN)/python -m tools.docs.trainers

gallery: build/extension
	$(BIN)/python examples/margin_gallery.py

# trains what docs/study_results.jsonl lacks, all of it in hours; goes on where it stopped
study: build/extension
	$(BIN)/python examples/study.py $(STUDY_ARGS)

bench: build/extension
	$(BIN)/python -m benchmarks.head $(BENCH_ARGS)

# on a machine with a GPU, with TORCH a CUDA build: tests, benchmark and kernel times in one report
gpu: build/extension
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

# the site, in build/site; its reference is read from the source, which is not imported
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/docs
	$(BIN)/python -m mkdocs build --quiet --strict

# the Triton and, where nvcc is, the CUDA kernels in every configuration for every target
compile-gate: $(VENV)/package
	$(BIN)/python -m tools.gates.triton --all
	$(BIN)/python -m tools.gates.cuda

lint: $(VENV)/package
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/package
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

# the kernels without torch: the best that this processor has, then every one in plain C++
sanitize: build/sanitize/native build/sanitize/emulated
	build/sanitize/native
	MARGINKERNELS_CPU=default build/sanitize/emulated
	MARGINKERNELS_CPU=avx2 build/sanitize/emulated
	MARGINKERNELS_CPU=avx512 build/sanitize/emulated

# the CUDA kernels with a fiber for every thread, and the launchers
sanitize-cuda: build/extension
	CUDA_HOST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
	    $$($(CXX) -print-file-name=libstdc++.so)" $(BIN)/python -m pytest -q tests/test_head.py -k cuda_host

build/sanitize/emulated: EMULATE := -DMK_EMULATE -Wno-psabi
build/sanitize/%: $(COMPILED) $(wildcard tests/native/*.h) tests/native/driver.cpp
	mkdir -p build/sanitize
	$(CXX) -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all $(EMULATE) \
	    -pthread $(filter-out %ops.cpp,$(wildcard csrc/cpu/*.cpp)) $(lastword $^) -o $@

# not by pip, which would compile everything again
build/extension: $(COMPILED) setup.py marginkernels/version.py $(VENV)/package
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/package: pyproject.toml $(VENV)/torch
	MARGINKERNELS_EXT=0 pip install -q --no-build-isolation -e '.[demo,dev]'
	pip install -q --no-deps --ignore-requires-python $(TTSEM)
	touch $@

$(VENV)/trainers: $(VENV)/package
	MARGINKERNELS_EXT=0 pip install -q --no-build-isolation -e '.[$(TRAINERS)]' $$(cat $(VENV)/torch.txt)
	touch $@

$(VENV)/docs: $(VENV)/package
	MARGINKERNELS_EXT=0 pip install -q --no-build-isolation -e '.[docs]'
	touch $@

# first, because the package alone would bring the newest release
$(VENV)/torch: $(VENV)/torch.txt
	pip install -q $(TORCH) 'setuptools>=77' ninja
	touch $@

# changes only when TORCH does
$(VENV)/torch.txt: FORCE | $(BIN)/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	    { echo 'error: $(PYTHON) has no venv (Debian, Ubuntu: apt install python3-venv)'; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
	    || { echo 'error: $(PYTHON) has no headers (Debian, Ubuntu: apt install python3-dev)'; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info marginkernels/_C.*
