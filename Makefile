# make demo | test | bench | bench-regression | lint | kernels-report | gpu-check | clean
#
# Everything runs in a virtual environment of its own (VENV), made on first use. PYTHON=... uses an
# existing interpreter instead and installs nothing into it: the library is built in place, and the
# packages of the extras must be there (gpu-check on a machine without a network).
#
#   TORCH   what pip installs as torch, and beside it   (TORCH="torch==2.13.0")
#   ARGS    further arguments for the command            (make test ARGS="-k parity")
#   WORKERS processes among which the tests are shared: by default one per core, four at most, and
#           a single one where there is a GPU, which they would share, or with PYTHON=
#   OUT     where demo and gpu-check write               (out/demo, out/gpu)
#   STAGE   of gpu-check: build, tests, sanitize, bench, e2e, kernels or host-tests; each goes on
#           where it stopped

VENV   ?= .venv
TORCH  ?= torch
SYSTEM_PYTHON ?= python3
ARGS   ?=
# What make compiles CUDA kernels for, unless TORCH_CUDA_ARCH_LIST says: the GPUs of this machine, or
# where there is none, one architecture, so that they are at least compiled. (pip: all that setup.py
# lists.)
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$$' | sort -u | paste -sd ';' -)
ARCHITECTURES = $(or $(GPUS),8.0+PTX)
CORES = $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
WORKERS ?= $(if $(GPUS)$(PYTHON),1,$(or $(filter 1 2 3,$(CORES)),$(if $(CORES),4,1)))
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

ifeq ($(PYTHON),)
PY    := $(VENV)/bin/python
READY := $(VENV)/.built
else
PY    := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
READY := inplace
endif

.PHONY: demo test bench bench-regression lint format kernels-report gpu-check inplace clean

demo: $(READY)
	$(PY) -m dnkd_ext demo --out $(or $(OUT),out/demo) --overwrite $(ARGS)

test: $(READY)
	$(PY) -m pytest tests $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist worksteal) $(ARGS)

# The ladder of all losses and training steps on this CPU, kept in benchmarks/results; then the report.
bench: $(READY)
	$(PY) -m benchmarks run --out benchmarks/results/losses.csv $(ARGS)
	$(PY) -m benchmarks e2e --out benchmarks/results/steps.csv
	$(PY) -m benchmarks report

# What got slower, relative to eager PyTorch, than was recorded on this processor.
bench-regression: $(READY)
	$(PY) -m benchmarks regression $(ARGS)

# Formatting and static checks; needs no torch.
lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' | sort | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' | sort | xargs $(VENV)/bin/clang-format -i

# Registers, spills and vector loads of the CUDA kernels; needs nvcc, no GPU.
kernels-report: $(READY)
	$(PY) -m benchmarks.kernels_report $(ARGS)

# Build, tests, compute-sanitizer, benchmarks and training steps on this machine's GPU.
gpu-check: $(if $(PYTHON),,$(READY))
	$(PY) -m benchmarks.gpu_check --out $(or $(OUT),out/gpu) $(if $(STAGE),--stage $(STAGE)) $(ARGS)

$(VENV)/bin/python:
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip "setuptools>=77" wheel

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q "ruff==0.17.*" "clang-format==23.*"
	touch $@

# One stamp per wish, so that another TORCH is installed and built against.
$(TORCH_STAMP): | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q ninja $(TORCH)
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.built: $(SOURCES) $(TORCH_STAMP)
	@echo "building dnkd_ext, log in $(VENV)/build.log"
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(ARCHITECTURES)}" \
	  $(VENV)/bin/python -m pip install -v --no-build-isolation -e ".[dev]" > $(VENV)/build.log 2>&1 \
	  || { tail -n 60 $(VENV)/build.log; exit 1; }
	@grep -E "^ *dnkd_ext: " $(VENV)/build.log | awk '!seen[$$0]++'
	touch $@

inplace:
	$(PYTHON) setup.py -q build_ext --inplace

clean:
	rm -rf $(VENV) build out *.egg-info dnkd_ext/_C*.so dnkd_ext/_build.json
