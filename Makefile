# make demo | make test | make lab      (PYTHON=python3.12 make demo  takes another interpreter)
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lab
demo: $(READY)
	$(BIN)/python -m probekit run --params notebooks/params/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lab: $(READY)
	$(BIN)/jupyter lab notebooks

$(READY): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,export]'
	touch $(READY)
