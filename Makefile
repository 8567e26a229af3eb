# Every command a reader needs. `make` alone lists them.
PYTHON  ?= python3
RUN     := .venv/bin/python -m

paper: PROFILE ?= quick
figures: PROFILE ?= laptop

.PHONY: help env paper figures test lab lint lock clean
help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo; echo 'Profiles: make paper PROFILE=smoke, quick (default), laptop, gpu; make figures PROFILE=laptop (default), gpu'

env: .venv/ready  ## the environment, made once from the lock files

# Modules are byte-compiled when they are first imported (--no-compile): most never are. Images that forbid Python to write
# bytecode would compile them again in every process of a study.
export PYTHONDONTWRITEBYTECODE :=
# A few packages come as source alone: they are built with the setuptools of the lock, not with whichever is newest.
# The marker is written last, and the folder is emptied first: an environment that was interrupted half-way is made anew.
.venv/ready: requirements.lock torch.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"kdlib needs Python 3.11 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Try: make env PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/setuptools.lock
	$(RUN) pip install --quiet --no-compile --require-hashes --no-deps -r .venv/setuptools.lock
	$(RUN) pip install --quiet --no-compile --require-hashes --no-deps --no-build-isolation -r requirements.lock
	$(RUN) pip install --quiet --no-compile -r torch.lock
	$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

paper: env  ## everything from raw text to the paper's PDF, for PROFILE (and its GRIDS); goes on where it was stopped
	$(RUN) snakemake --config profile=$(PROFILE) grids="$(GRIDS)"

figures: env  ## tables, figures and the PDF again, from the results of PROFILE as they lie there
	@$(RUN) kdlib paper --profile $(PROFILE) --analyses | xargs -P 2 -L 1 $(RUN) kdlib run --profile $(PROFILE)
	$(RUN) kdlib paper --profile $(PROFILE)

test: env  ## everything that proves it works: unit tests, and the smoke profile through the pipeline
	$(RUN) pytest -n 2 --dist loadscope

lab: env  ## Jupyter on the notebooks
	$(RUN) jupyter lab --notebook-dir notebooks

lint: env  ## style and common mistakes (needs ruff)
	ruff check kdlib tests

# torch comes in a CPU and in a CUDA build, so it and what only it needs are left to torch.lock.
COMPILE := uv pip compile pyproject.toml --quiet --extra test --extra lab --extra build --universal --python-version 3.11 --no-header --no-annotate
lock:  ## requirements.lock anew from pyproject.toml, and environment.yml from both locks (needs uv)
	@sed -n '/^#/p' requirements.lock > requirements.lock.new
	@skip=$$($(COMPILE) | sed -nE 's/^((nvidia|cuda)-[a-z0-9-]+|torch|triton)==.*/--no-emit-package \1/p') && \
	$(COMPILE) --generate-hashes $$skip >> requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@awk 'FILENAME != "environment.yml" { if (split($$1, pin, "==") == 2) version[pin[1]] = pin[2]; next } \
	split($$2, pin, "==") == 2 { sub(/==[^ ]*/, "==" version[pin[1]]) } 1' \
	requirements.lock torch.lock environment.yml > environment.yml.new
	@mv environment.yml.new environment.yml

clean:  ## all that can be made again but the environment: results of smoke and quick, caches of tools
	rm -rf results/smoke results/quick figures/smoke figures/quick paper/generated/smoke paper/generated/quick paper/build
	rm -rf .snakemake .pytest_cache .hypothesis .ruff_cache
