# make check: judge real public routers.  make test: test this project.  Both install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check test install spec
check: install
	$(BIN)/moe-conformance run

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

spec: install
	$(BIN)/moe-conformance spec > SPEC.md
