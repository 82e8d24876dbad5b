# make check: judge real public routers.  make test: test this project.  Both install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check test install docs bench
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

# SPEC.md and the generated parts of README.md.
docs: install
	$(BIN)/python -m tools.docs
