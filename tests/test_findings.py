"""Tests: each page of docs/findings shows what it says, where the package that it is about is installed.

A page is named PACKAGE-what.md. Its first block of Python is a script for a CPU, of under 60 lines; its first block of
text is what the script prints. The scripts of a package that takes long to import run one after the other in one
process, each with names of its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "findings").glob("*-*.md"))
MOST_LINES = 60
TOGETHER = ("transformers",)
"""Packages whose scripts set up nothing for their process, so that they share one."""
RUN_EACH = """
import contextlib, io, json, sys, traceback
for name, code in json.load(sys.stdin).items():
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
    except Exception:
        printed.write(traceback.format_exc())
    print(json.dumps([name, printed.getvalue()]), flush=True)
"""


def block_of(page: Path, language: str) -> str:
    """The first block of code of a page in that language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no block of {language}"
    return found[1]


def package_of(page: Path) -> str:
    return page.stem.partition("-")[0]


def test_there_are_findings():
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_finding_can_be_filed_as_it_stands(page):
    text, code = page.read_text(), block_of(page, "python")
    assert text.startswith("# ")
    assert "\n## Where\n" in text
    assert "\n## Mend\n" in text
    assert re.search(rf"^{package_of(page)} \d+\.\d+", text, re.MULTILINE), "no version"
    assert len(code.splitlines()) < MOST_LINES
    assert not re.search(r"\b(moe_ref|moe_jax|moe_torch|conformance)\b", code), "it is about their package alone"
    assert {"observed", "correct"} <= set(re.findall(r"\w+", block_of(page, "text")))


@pytest.fixture(scope="module")
def printed_together(tmp_path_factory) -> dict[str, str]:
    """What the scripts of the packages of TOGETHER print, by the name of their page."""
    codes = {page.name: block_of(page, "python") for page in PAGES if package_of(page) in TOGETHER}
    done = run([sys.executable, "-c", RUN_EACH], tmp_path_factory.mktemp("findings"), json.dumps(codes))
    return dict(json.loads(line) for line in done.stdout.splitlines())


def run(command: list[str], folder: Path, given: str = "") -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, cwd=folder, input=given, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_script_of_a_finding_prints_what_its_page_says(page, tmp_path, request):
    if importlib.util.find_spec(package_of(page)) is None:
        pytest.skip(f"{package_of(page)} is not installed here")
    if package_of(page) in TOGETHER:
        printed = request.getfixturevalue("printed_together")[page.name]
    else:
        printed = run([sys.executable, "-c", block_of(page, "python")], tmp_path).stdout
    assert printed == block_of(page, "text")
