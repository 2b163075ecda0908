# make demo   the whole pipeline on generated videos, then its report
# make test   the tests, in one process more than there are cores, four at most (WORKERS=0: in one)
# make test-slow   those that take long or measure the machine, in one process
# make lint   ruff and mypy
# make tiny-clip   train the small world's CLIP again
# Each sets up .venv first, once; afterwards only when pyproject.toml or what is compiled changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= runs/demo
# One more than cores: many a test waits for a process that it started.
WORKERS ?= $(shell $(PYTHON) -c 'import os; ours = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count())); print(len(ours(0)) + 1)')

.PHONY: demo test test-slow lint format tiny-clip clean

demo: $(INSTALLED)
	$(BIN)/s4v demo --out $(DEMO_OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest tests -m "not slow" --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/s4v
	MYPYPATH=$(VENV)/types $(BIN)/mypy --cache-dir $(VENV)/mypy-cache -p s4v

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tiny-clip: $(INSTALLED)
	$(BIN)/python -m s4v.demo.tiny_clip --out backbone/tiny_clip

$(INSTALLED): pyproject.toml setup.py store/_native.c store/_crc32c.h
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else "s4v needs Python 3.11 or newer, $(PYTHON) is " + v + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build s4v.egg-info store/_native*.so
