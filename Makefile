# make setup   .venv with pinned dependencies
# make demo    the whole main job on simulated slices, offline, minutes on two cores
# make test    lint, format check, snakemake --lint, all tests
# make test-slurm  the cluster profile on a SLURM of two nodes on this machine (as root, Debian's packages)
# make test-faults  fifty kills and every fault at every stage on a tiny simulated corpus; its table goes into docs/reliability.md
# make test-validator  the public CELLXGENE validator on a simulated file
PYTHON ?= python3
BIN := .venv/bin
CORES ?= all
VALIDATOR := 7.1.2
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help setup demo test test-slurm test-faults test-validator lint format clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: .venv/.ready

# torch goes first and by its pin: a plain requirement would pull the newest build, several GB larger.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"stpatch needs Python >= 3.11, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,train,eval,dev]'
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) all --configfile demo/config.yaml
	@echo
	@echo "The demo ran on simulated slices. Look at:"
	@echo "  report  $(CURDIR)/results/report.html"
	@echo "  model   $(CURDIR)/results/pretrain/model/"
	@echo "  scores  $(CURDIR)/results/metrics/scores.tsv"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint --configfile demo/config.yaml

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

test: lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not slurm"

# Where SLURM can't be had the tests are skipped, and say why.
test-slurm: setup
	@tests/slurm/install.sh
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slurm tests/slurm

test-faults: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.faults.campaign --write docs/reliability.md

# The validator's pins clash with ours.
.venv-validator/.ready:
	$(PYTHON) -m venv .venv-validator
	.venv-validator/bin/python -m pip install --quiet --disable-pip-version-check cellxgene-schema==$(VALIDATOR)
	@touch $@

test-validator: setup .venv-validator/.ready
	PATH="$(CURDIR)/.venv-validator/bin:$$PATH" $(BIN)/python -m pytest -k public_validator tests/unit/test_simulate.py

clean:
	rm -rf results resources .snakemake
