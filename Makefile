# make demo, make test: each sets up what it needs in one step; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNNER ?= ray
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 --durations-min=1

.PHONY: demo serve fuzz test test-all check docs screenshots bench chaos sweep-smoke clean setup setup-dev

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(VENV) .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) bash scripts/setup.sh $(VENV) ".[dev,gguf,interop,lab,real]"
	@touch $(VENV)/.ready $@

demo: setup  ## the whole loop on a synthetic corpus with planted errors; RUNNER=local for one process
	$(BIN)/safer-ray run configs/demo.yaml --runner $(RUNNER)

serve: setup  ## the scoring service with the demo's bundle, on 127.0.0.1:8000; ARGS="keys=FILE"
	@manifest=$$(ls -t runs/demo/auditor-*/manifest.json 2>/dev/null | head -n 1); \
	if [ -z "$$manifest" ]; then echo "no bundle in runs/demo; run make demo first" >&2; exit 2; fi; \
	exec $(BIN)/python -m serve auditor="$${manifest%/*}" $(ARGS)

fuzz: setup-dev  ## 50,000 hostile requests to the service, in process; prints what they were answered
	$(BIN)/python -m bench.fuzz_serve

test: setup-dev  ## all tests, in two processes, each with whole files: what a file sets up is set up once; the ten slowest are named
	$(PYTEST)

test-all: setup-dev  ## and those that take long
	$(PYTEST) -m "long or not long"

check: setup-dev  ## format, lint, types, import boundaries, the docs' links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --noconftest tests/project/test_boundaries.py
	$(BIN)/mkdocs build --quiet

docs: setup-dev  ## the documentation's pages, in build/site
	$(BIN)/mkdocs build --quiet

screenshots: setup-dev  ## docs/images: the report and the service's page, of the demo's run
	@test -e runs/demo/report.html || { echo "no run in runs/demo; run make demo first" >&2; exit 2; }
	PYTHON=$(BIN)/python bash scripts/chromium.sh build/browser
	PYTHONPATH=.:tests $(BIN)/python -W ignore scripts/screenshots.py runs/demo docs/images

chaos: setup-dev  ## audits on several nodes while twenty processes are killed; prints what became of the rows
	$(BIN)/python tests/chaos/fire.py build/chaos
	$(BIN)/python tests/chaos/hostile.py build/chaos

sweep-smoke: setup-dev  ## a tiny sweep, to see that sweeps work
	$(BIN)/safer-ray sweep configs/sweep_smoke.yaml

bench: setup-dev  ## what bench/RESULTS.md reports
	$(BIN)/python -m bench.corpus_seeds

clean:  ## everything that make or a run wrote
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
