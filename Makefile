# Every target makes its own virtual environment on first use; later it is there and costs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FLOORS := .venv-floors

.PHONY: study test floors lint bench docs browser clean

study: $(VENV)/study.stamp  ## train on real digits, write study-report/report.html
	$(BIN)/batchnorm study $(ARGS)

test: $(VENV)/test.stamp browser  ## everything that must hold
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Kernels of the old Numba are kept apart: they would replace those of the new one.
floors: $(FLOORS)/floors.stamp  ## a little of everything with the oldest versions that pyproject.toml admits
	OMP_NUM_THREADS=1 NUMBA_CACHE_DIR=$(FLOORS)/numba $(FLOORS)/bin/python tests/floors.py

lint: $(VENV)/test.stamp  ## what `test` checks without running anything, and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

docs: $(VENV)/docs.stamp  ## build the site, build/site/index.html
	$(BIN)/mkdocs build $(ARGS)

bench: $(VENV)/bench.stamp  ## time layers and whole models against PyTorch on this machine
	$(BIN)/python -m benchmarks $(ARGS)

# The study's report is tested in a real browser. Where there is none and apt may bring one, it does; elsewhere those
# tests are skipped.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; } \
	  >/dev/null 2>&1; } || echo "No Chromium here: the report is not tested in a browser."

clean:
	rm -rf $(VENV) $(FLOORS) study-report

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/study.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[study]"
	touch $@

$(VENV)/bench.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[bench]"
	touch $@ $(VENV)/study.stamp

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[test,lint]"
	touch $@ $(VENV)/study.stamp $(VENV)/bench.stamp $(VENV)/docs.stamp

# From nothing, so that nothing newer is left in it.
$(FLOORS)/floors.stamp: pyproject.toml floors.txt
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint floors.txt \
		--editable ".[torch,keras,jax,onnx,diagnose,study,bench]"
	touch $@
