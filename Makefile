# Every command a reader needs. `make` alone lists them.
PROFILE ?= quick
PYTHON  ?= python3
VENV    := .venv
RUN     := $(VENV)/bin/python -m

.PHONY: help
help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(VENV)/ready  ## the environment, made once from the lock files

$(VENV)/ready: requirements.lock torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"kdlib needs Python 3.11 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(RUN) pip install --quiet -r torch.lock
	$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
