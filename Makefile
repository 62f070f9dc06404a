PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo

.PHONY: demo test slow browser lint types clean

demo: $(READY)
	$(BIN)/fx-influence run --out $(RUN)

test: lint types
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not browser"

slow: $(READY)
	$(BIN)/pytest -n 2 --dist loadgroup -m slow

# needs Chromium, Debian's package chromium
browser: $(READY)
	$(BIN)/pytest -m "browser and not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
