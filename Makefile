# make demo, make test: each sets up what it needs in one step; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNNER ?= local
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check bench clean setup setup-dev

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(VENV) .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(VENV) ".[dev,interop,real]"
	@touch $(VENV)/.ready $@

demo: setup  ## the whole loop on a synthetic corpus with planted errors
	$(BIN)/safer-ray run configs/demo.yaml --runner $(RUNNER)

test: setup-dev  ## all tests
	$(BIN)/python -m pytest

check: setup-dev  ## format, lint, types, import boundaries
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_boundaries.py

bench: setup-dev  ## what bench/RESULTS.md reports
	$(BIN)/python -m bench.corpus_seeds

clean:  ## everything that make or a run wrote
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
