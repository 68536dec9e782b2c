# Two commands: make train, make test. Each makes .venv and installs what is missing, once.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed

.PHONY: train train-classifier test test-all lint constraints clean

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

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'error: Python 3.11 or newer is needed; name one by make PYTHON=/path/to/python'; exit 2; }
	@echo 'installing into $(VENV): about a minute, once'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]' --constraint constraints.txt
	@touch $@

# Exact versions for every supported Python, from the ranges in setup.cfg.
constraints: $(STAMP)
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 --all-extras --no-emit-index-url --quiet \
		--no-annotate --custom-compile-command 'make constraints' setup.cfg --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist src/kronmesh.egg-info kronmesh.egg-info .pytest_cache .ruff_cache .hypothesis
