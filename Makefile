# make check: judge real public routers.  make test: test this project.  Both install what they need into .venv.
# make matrix: the oldest and newest JAX and PyTorch under each Python, in .matrix; its table is docs/matrix.md.
# make peers: code bases that need an environment of their own, in .peers: MaxText (Python 3.12; docs/maxtext.md), megatron-core
# (Python 3.12; docs/megatron.md).
# make bare: the wheel without any framework, with the oldest NumPy, into .bare.  PYTHON=python3.13 chooses another one.
PYTHON ?= python3
BIN := .venv/bin
# Each of many processes would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: check test bare install docs matrix peers
check: install
	$(BIN)/moe-conformance run
	if [ -e .peers/maxtext/installed ]; then .peers/maxtext/bin/moe-conformance run maxtext; fi
	if [ -e .peers/megatron/installed ]; then .peers/megatron/bin/moe-conformance run megatron; fi

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 --dist worksteal

bare:
	rm -rf .bare build  # build/ of an earlier tree would get into the wheel
	$(PYTHON) -m venv .bare
	.bare/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .bare/wheel .
	.bare/bin/python -m pip install --quiet --disable-pip-version-check .bare/wheel/*.whl -c constraints-oldest.txt
	cd .bare && bin/python ../tools/bare.py wheel/*.whl && bin/moe-conformance run reference --stage select

# ONLY="jax 3.13 newest" runs what has all these words.
matrix:
	$(PYTHON) -m tools.matrix $(ONLY)

# Not part of make check, which judges those that are there.
peers:
	$(PYTHON) -m tools.peers

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

# SPEC.md and the pages of docs/
docs: install
	$(BIN)/python -m tools.docs
