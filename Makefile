# Everything runs from .venv, which the first target asked for makes. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow soak lint bench reproduce card memory gpu-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv and install the lab into it

# Depends on pyproject.toml: a changed dependency brings the environment up to date at the next `make`.
# The stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, Triton and the lab into $(VENV) (about 5.5 GB, a few minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

train: $(READY)  ## train SimpleNet on the embedded images through the Triton kernels
	$(BIN)/python -m train.run simplenet --conv triton

# Two workers share two cores: one thread each, or they fight over both.
test: $(READY)  ## the tests that together take a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(READY)  ## the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# Its longest tests are of one file: whoever is done takes tests from the other.
soak: $(READY)  ## the long fuzz and the faults at random moments, up to twenty minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m soak

lint: $(READY)  ## ruff
	$(BIN)/ruff check .

bench: $(READY)  ## time convolutions, training steps, attacks and feeding, beside other implementations
	$(BIN)/python -m pytest bench/ --benchmark-only

reproduce: $(READY)  ## the course write-up's report, cut down to a quarter hour: runs/reproduce-quick/REPORT.html
	$(BIN)/python -m bench.reproduce --quick

card: $(READY)  ## what the compiler's output says of the kernels, on GPUs that are not here
	$(BIN)/python -m bench.report_card

memory: $(READY)  ## account for the memory of a training step of SimpleNet
	$(BIN)/python -m bench.memory simplenet

gpu-check: $(READY)  ## on a machine with a GPU: tests, tiles, tuning and times on it, one report
	$(BIN)/python -m bench.gpu_check $(ARGS)

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
