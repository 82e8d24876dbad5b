"""Tests: each page of docs/findings shows what it says, where the package that it is about is installed.

A page is named PACKAGE-what.md. Its first block of Python is a script for a CPU, of under 60 lines; its first block of
text is what the script prints. What takes seconds to import is imported once: such a script runs in a fork of a process
that has imported it and has done nothing else.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.run.running import missing

PAGES = sorted((Path(__file__).parents[1] / "docs" / "findings").glob("*-*.md"))
MOST_LINES = 60
# gloo listens on the address of the host's name, which need not be this machine's.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}  # fmt: skip
IMPORTED_ONCE = {
    "megatron": "megatron.core.transformer.moe.router", "torchtitan": "torchtitan.models.gpt_oss.sharding",
    "transformers": "transformers.modeling_utils",
}  # fmt: skip
"""Package -> what its scripts import for seconds."""
FORKS = """
import importlib, json, os, sys, traceback
importlib.import_module(sys.argv[1])
for line in sys.stdin:
    if not (child := os.fork()):
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        code = 1
        try:
            exec(compile(json.loads(line), "script", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, open("out").read(), open("err").read()]), flush=True)
"""


def block_of(page: Path, language: str) -> str:
    """The first block of code of a page in that language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no block of {language}"
    return found[1]


def package_of(page: Path) -> str:
    return page.stem.partition("-")[0]


@pytest.fixture(scope="module")
def run_script(tmp_path_factory):
    """Runs the script of a page: its exit code, standard output and standard error."""
    folder, importers = tmp_path_factory.mktemp("findings"), {}

    def run(page: Path) -> tuple[int, str, str]:
        module, code = IMPORTED_ONCE.get(package_of(page)), block_of(page, "python")
        command = {"cwd": folder, "env": ENVIRONMENT, "text": True}
        if module is None:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, **command)
            return done.returncode, done.stdout, done.stderr
        if module not in importers:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            importers[module] = subprocess.Popen([sys.executable, "-c", FORKS, module], **pipes, **command)
        print(json.dumps(code), file=importers[module].stdin, flush=True)
        return tuple(json.loads(importers[module].stdout.readline()))

    yield run
    for importer in importers.values():
        importer.communicate()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_script_of_a_finding_prints_what_its_page_says(page, run_script):
    if why := missing(package_of(page)):
        pytest.skip(why)
    code, output, errors = run_script(page)
    assert code == 0, errors
    assert output == block_of(page, "text")
