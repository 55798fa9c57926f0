# make demo: set up .venv and plan the demo trace.  make test: set up .venv and run every check.
# PYTHON names the interpreter to set up with, 3.11 or newer. Without make: sh run.sh demo | test
PYTHON ?= python3

.PHONY: demo test clean
demo test:
	@PYTHON=$(PYTHON) sh run.sh $@

clean:
	rm -rf .venv out .mypy_cache .ruff_cache .hypothesis .import_linter_cache
