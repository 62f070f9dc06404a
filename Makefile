PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo

PYTEST := $(BIN)/pytest -n 2 --dist loadscope
TOLERANCES := $(PYTEST) --hypothesis-profile=kernels -m "tolerance and not slow and not extra"

.PHONY: demo real test slow processors browser extra docs lint types clean

demo: $(READY)
	$(BIN)/fx-influence run --out $(RUN)

# a chat model of 135M parameters from PyPI, some steps of GRPO, and which rollouts and tokens moved its entropy; minutes
real: $(READY)
	$(BIN)/python -m benchmarks.real runs/smollm2
	$(BIN)/fx-influence run runs/smollm2/smollm2.yaml --out runs/smollm2/run

test: lint types
	$(PYTEST) -m "not slow and not browser and not extra"

slow: $(READY)
	$(PYTEST) -m slow

# the tests with a tolerance with other processors' kernels: torch's plain ones on two threads, and those of AVX2.
# Threads wait passively, since those of two test processes share the cores.
processors: $(READY)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(TOLERANCES)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(TOLERANCES)

# needs Chromium, Debian's package chromium
browser: $(READY)
	$(PYTEST) -m "browser and not slow"

# packages that the environment does not have: W&B, trackio, which asks for an older pillow, and DeepSpeed, which is
# built with the torch that is there
extra: $(READY)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade --target $(VENV)/extra -r tests/extra.txt
	PYTHONPATH=$(CURDIR)/$(VENV)/extra $(PYTEST) -m extra

# the API reference, from the docstrings; a warning ends the build
docs: $(READY)
	$(BIN)/python docs/build.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist docs/api *.egg-info
