# Two commands do everything: `make run` and `make test`. The rest is for whoever works on Lathe.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint desk bench gallery docs clean help

run: $(VENV)/ready            ## every study at smoke scale, then the gallery in site/
	$(BIN)/lathe run

test: $(VENV)/ready           ## all tests: with shapes checked, then those that compile, then those that take times
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not compile and not timed"
	OMP_NUM_THREADS=1 LATHE_SHAPE_CHECKS=0 $(BIN)/python -m pytest -n auto --dist worksteal -m "compile and not timed"
	OMP_NUM_THREADS=1 LATHE_SHAPE_CHECKS=0 $(BIN)/python -m pytest -m timed

lint: $(VENV)/ready           ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

desk: $(VENV)/ready           ## every study at desk scale (an hour or so), recorded in results/
	$(BIN)/lathe run $$($(BIN)/python -c "from lathe import studies; print(*studies.slugs())") --scale desk --record results

bench: $(VENV)/ready          ## side by side with the peers (benchmarks/requirements.txt), recorded in results/bench.json
	$(BIN)/lathe bench --json results/bench.json

gallery: $(VENV)/ready        ## the site again, from what is measured
	$(BIN)/lathe gallery

docs: $(VENV)/ready           ## the measured parts of docs/papers, from results/
	$(BIN)/python docs/measured.py

$(VENV)/ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,cluster,graphs]'
	$(BIN)/pip install -q --no-deps -r benchmarks/requirements.txt
	touch $@

clean:                        ## environment, caches, runs and site
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/  /'
