# The commands of the README. Each makes a virtual environment in .venv the first time.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test check chaos clean

demo: .venv/demo.stamp
	@$(BIN)/python examples/demo.py

# Two files of tests at a time on each core: most of them wait for processes half of the time. The tests are collected
# once before: that writes the bytecode of all of them, which each of pytest's processes would make for itself
# otherwise, 4 s for each. mypy takes another core meanwhile, and goes on beside the first tests: no verdict depends on
# time.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & mypy=$$!; $(BIN)/pytest -q --collect-only >/dev/null; \
		$(BIN)/pytest -n $$($(BIN)/python -c 'import os; print(2 * (os.cpu_count() or 1))') --dist loadfile --no-loadscope-reorder; \
		tests=$$?; wait $$mypy && exit $$tests

# The fast lane: it leaves out the tests that start servers, workers or helper processes, and those of hundreds of cases.
check: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & mypy=$$!; $(BIN)/pytest -q -n auto --dist loadfile -m 'not processes and not thorough'; tests=$$?; \
		wait $$mypy && exit $$tests

# The long soak, 2,000 jobs and 100 faults, and twice ten losses of a Redis master. The seed is another each day; SEED=N
# repeats one.
chaos: SEED ?= $(shell date +%Y%m%d)
chaos: .venv/test.stamp
	cd tests && ../$(BIN)/python -m chaos.soak --seed $(SEED) --report ../docs/chaos.json
	cd tests && ../$(BIN)/python -m chaos.failovers --seed $(SEED) --durability replica --report ../docs/failovers.json
	cd tests && ../$(BIN)/python -m chaos.failovers --seed $(SEED) --durability memory --report ../docs/failovers.json

.venv/demo.stamp: pyproject.toml | .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[server]'
	@touch $@

.venv/test.stamp: pyproject.toml | .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ .venv/demo.stamp

.venv:
	@test -n '$(PYTHON)' || { echo 'fastgpt2 needs Python 3.11 or newer; name one: make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
