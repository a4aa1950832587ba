# make quickstart | make test | make test-slow | make test-lowest | make lint | make browser | make venv.
# PYTHON chooses the interpreter (3.10 to 3.13), TORCH the torch requirement.
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
# One process per core, eight at most: each loads torch.
PYTEST := -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: venv quickstart test test-slow test-lowest lint browser clean

venv: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13)) ' \
	  || { echo "error: Python 3.10 to 3.13 is needed, $$($(PYTHON) --version) came; set PYTHON=python3.11" >&2; exit 1; }
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
	$(BIN)/streamvid quickstart

test: $(VENV)/.test-installed
	$(BIN)/python $(PYTEST)

$(VENV)/.lint-installed: $(VENV)/.installed
	$(PIP) install --quiet -e ".[lint]"
	touch $@

# Format, style and types.
lint: $(VENV)/.lint-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What the tests of the page need to run in a browser; without it they are skipped. Where there is no Chromium, root
# gets Debian's.
browser: $(VENV)/.test-installed
	$(PIP) install --quiet -e ".[browser]"
	$(BIN)/python -m demos.browser --install

# What `make test` leaves out: above about 8 seconds per test.
test-slow: $(VENV)/.test-installed
	$(BIN)/python $(PYTEST) -m "slow and not gpu"

# The tests with the lowest version of everything that pyproject.toml allows; several gigabytes: such a torch is a CUDA build
# where only PyPI is reached. TESTS narrows it: make test-lowest TESTS=tests/codecs
LOWEST := .venv-lowest
TESTS ?= tests
$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --extra test \
	  pyproject.toml -o $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps -e .
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python $(PYTEST) $(TESTS)

clean:
	rm -rf $(VENV) $(LOWEST) runs/quickstart
