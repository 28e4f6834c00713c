# `make demo` and `make test` need nothing but python3 (3.11 or newer): both make .venv themselves.
VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test check clean

demo: $(VENV)/.installed  ## train and judge a small comparison, then judge a shipped router on a real base
	$(VENV)/bin/bem demo

test: $(VENV)/.installed-dev  ## every test
	VENV=$(VENV) scripts/test

check: $(VENV)/.installed-dev  ## lint, format, types, import layers
	VENV=$(VENV) scripts/check

clean:  ## forget the environment and the caches, keep the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("BEM needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e '.[gguf]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.installed
