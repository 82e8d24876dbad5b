"""tools, matrix: the oldest and the newest JAX and PyTorch under each Python, each in an environment of its own.

    make matrix                      # all of them; rows that were there before are kept where one is named
    python -m tools.matrix jax       # those of JAX alone
    python -m tools.matrix torch 3.11 oldest

Environments lie in .matrix/ and are made once. The table is docs/matrix.md. A row says what was installed and how many
tests passed, or why there is nothing to say.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".matrix"
PAGE = ROOT / "docs" / "matrix.md"
PYTHONS = ("3.11", "3.13")
OLDEST = {"jax": "jax==0.10.0 jaxlib==0.10.0", "torch": "torch==2.11.*"}
"""What `pyproject.toml` asks for at least."""
NEWEST = {"jax": "jax jaxlib", "torch": "torch", "tokamax": "tokamax>=0.0.17"}
BESIDES = "numpy ml_dtypes safetensors hypothesis pytest"
TESTS = {
    "jax": ("tests/moe_jax/test_routing.py", "tests/moe_jax/test_parallel.py", "tests/moe_jax/test_collectives.py"),
    "torch": ("tests/moe_torch/test_router.py", "tests/moe_torch/test_moe.py", "tests/moe_torch/test_experts.py"),
    # Beside the newest JAX, without its kernels: what it says of its arguments, and what XLA does in their place.
    "tokamax": ("tests/moe_jax/test_grouped_matmul.py", "tests/moe_jax/test_ways.py"),
}
LIMIT = 1800
"""Seconds for the tests of one row."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment: what it holds, and what came of it."""

    framework: str
    wish: str
    """oldest or newest."""
    python: str
    versions: str = ""
    found: str = ""


def main(words: list[str]) -> None:
    """Runs the rows that have all these words, and writes the table.

    Raises:
        SystemExit: with 1, where a test failed.
    """
    rows = {(row.framework, row.wish, row.python): row for row in kept()}
    failed = False
    for wanted in every_row():
        if set(words) <= {wanted.framework, wanted.wish, wanted.python}:
            print(f"{wanted.framework} {wanted.wish}, Python {wanted.python} ...", flush=True)
            row = tried(wanted)
            print(f"    {row.versions or '-'}: {row.found}", flush=True)
            rows[row.framework, row.wish, row.python] = row
            failed |= "failed" in row.found or "error" in row.found
    ENVIRONMENTS.mkdir(exist_ok=True)
    PAGE.write_text(page([rows.get((row.framework, row.wish, row.python), row) for row in every_row()]))
    if failed:
        raise SystemExit(1)


def every_row() -> Iterator[Row]:
    """In the order of the table."""
    for framework in OLDEST:
        for wish in ("oldest", "newest"):
            for python in PYTHONS:
                yield Row(framework=framework, wish=wish, python=python)
    yield Row(framework="tokamax", wish="newest", python="3.12")  # the oldest that it takes


def tried(row: Row) -> Row:
    """The row with what is installed, and what its tests say."""
    if (interpreter := interpreter_of(row.python)) is None:
        return Row(**asdict(row) | {"found": "no such Python here"})
    folder = ENVIRONMENTS / f"{row.framework}-{row.wish}-{row.python}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([*interpreter, "-m", "venv", folder], check=True)
        wishes = (OLDEST if row.wish == "oldest" else NEWEST)[row.framework]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wishes.split()]
        done = subprocess.run([*install, *BESIDES.split()], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder)
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            return Row(**asdict(row) | {"found": f"not installed: {said[-1]}"})
        (folder / "installed").touch()
    return Row(**asdict(row) | {"versions": versions_in(python, row.framework), "found": tests_in(python, row)})


def interpreter_of(version: str) -> list[str] | None:
    """A command that starts this Python: of the path, or of pyenv."""
    for command in ([f"python{version}"], *(
        [str(path)] for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    )):  # fmt: skip
        found = shutil.which(command[0])
        # pyenv puts a command for each Python on the path, which works for those that are chosen alone.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return [found]
    return None


def versions_in(python: Path, framework: str) -> str:
    """Of the framework and of NumPy."""
    code = (
        f"from importlib.metadata import version as v; print('{framework}', v('{framework}') + ', numpy', v('numpy'))"
    )
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def tests_in(python: Path, row: Row) -> str:
    """pytest's last line, without its time."""
    # No warning is an error here: what a release deprecates breaks nothing yet.
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *TESTS[row.framework]]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    except subprocess.TimeoutExpired:
        return f"failed: no end after {LIMIT} s"
    (python.parents[1] / "tests.txt").write_text(done.stdout + done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|errors?)", done.stdout.splitlines()[-1]) if done.stdout else []
    if not counts:
        return f"failed: exit code {done.returncode}"
    return ", ".join(f"{number} {word}" for number, word in counts)


def page(rows: list[Row]) -> str:
    """The table, with the rows as data in a comment, so that a run of some keeps the others."""
    lines = [
        "# Matrix",
        "",
        "<!-- Generated by `make matrix`; do not edit. -->",
        "",
        "The oldest JAX and PyTorch that we support, and the newest that pip installs, under the oldest and the newest",
        "Python: a short set of tests of the implementation, each row in an environment of its own.",
        "",
        "| framework | Python | installed | tests |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.framework}, {row.wish} | {row.python} | {row.versions or '-'} | {row.found or 'not tried yet'} |"
        for row in rows
    ]
    return "\n".join([*lines, "", f"<!-- {json.dumps([asdict(row) for row in rows])} -->", ""])


def kept() -> list[Row]:
    """The rows of the page that is there."""
    found = re.search(r"<!-- (\[.*\]) -->", PAGE.read_text()) if PAGE.exists() else None
    return [Row(**row) for row in json.loads(found[1])] if found else []


if __name__ == "__main__":
    main(sys.argv[1:])
