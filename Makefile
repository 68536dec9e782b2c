# Two commands: make train, make test. Each makes .venv and installs what is missing, once.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python) $(shell command -v python3.13 || command -v python3.12))
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed

.PHONY: train train-classifier test test-all test-prerelease lint docs docs-check constraints clean

train: $(STAMP)
	$(VENV)/bin/kronmesh compare --config=digits --workdir=runs/digits

train-classifier: $(STAMP)
	$(VENV)/bin/kronmesh compare --config=digits_classifier --workdir=runs/digits_classifier

test: $(STAMP)
	$(if $(SHAPES),KRONMESH_SHAPES=1) $(RUN) -m pytest -n 2 $(TESTS)

test-all: $(STAMP)
	$(RUN) -m pytest -n 2 --tests=long $(if $(SHARE),--share=$(SHARE))

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(RUN)

# The site of documentation, served here; and built once, where a warning is an error, and opened in a browser.
docs: $(STAMP)
	$(VENV)/bin/mkdocs serve

docs-check: $(STAMP)
	$(RUN) -m pytest --tests=all tests/test_site.py

# kron and parallel on the newest pre-release of JAX that the index offers. src/program alone touches JAX's internals.
test-prerelease:
	@test -n "$(PYTHON312)" || { echo 'error: JAX >= 0.11 needs Python 3.12 or newer; name one by PYTHON312=/path/to/python'; exit 2; }
	$(PYTHON312) -m venv .venv-prerelease
	.venv-prerelease/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	.venv-prerelease/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --pre jax jaxlib
	.venv-prerelease/bin/python -c 'import jax; print("jax", jax.__version__)'
	.venv-prerelease/bin/python -m pytest -n 2 tests/kron tests/parallel || \
		{ echo 'what breaks with this JAX is to be mended in src/program'; exit 1; }

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'error: Python 3.11 or newer is needed; name one by make PYTHON=/path/to/python'; exit 2; }
	@echo 'installing into $(VENV): about a minute, once'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test,docs]' --constraint constraints.txt
	@touch $@

# Exact versions for every supported Python, from the ranges in setup.cfg.
constraints: $(STAMP)
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 --all-extras --no-emit-index-url --quiet \
		--no-annotate --custom-compile-command 'make constraints' setup.cfg --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist src/kronmesh.egg-info kronmesh.egg-info .pytest_cache .ruff_cache .hypothesis
