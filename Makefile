# make quickstart | make test | make test-slow | make venv. PYTHON chooses the interpreter (3.10 to 3.12), TORCH the torch requirement.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Where there is no NVIDIA driver, the CPU build: a tenth of the download of the CUDA build.
HAS_NVIDIA := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(HAS_NVIDIA),yes)
TORCH ?= torch>=2.11
else
TORCH ?= torch==2.13.0
endif

.PHONY: venv quickstart test test-slow clean

venv: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12)) ' \
	  || { echo "error: Python 3.10 to 3.12 is needed, $$($(PYTHON) --version) came; set PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) can't make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
ifeq ($(HAS_NVIDIA),yes)
	$(PIP) install --quiet "$(TORCH)"
else
	$(PIP) install --quiet --retries 0 --timeout 5 --index-url $(CPU_INDEX) "$(TORCH)" 2>/dev/null \
	  || $(PIP) install --quiet "$(TORCH)"
endif
	$(PIP) install --quiet -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(PIP) install --quiet -e ".[test]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python tools/quickstart.py

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest

# What `make test` leaves out: above about 20 seconds a test.
test-slow: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m "slow and not gpu"

clean:
	rm -rf $(VENV) runs/quickstart
