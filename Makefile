# make demo | make test | make lab      (PYTHON=python3.12 make demo  takes another interpreter)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lab lint
demo: .venv/.ready
	$(BIN)/python -m probekit run --params notebooks/params/demo.yaml

# ARGS=-k… runs some of the tests, ARGS="-m quick" those that answer fast
test: lint
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.ready-for-tests
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

lab: .venv/.ready
	$(BIN)/jupyter lab notebooks

.venv/.ready: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[export]'
	touch $@

.venv/.ready-for-tests: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.ready
