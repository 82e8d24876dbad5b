"""tests of what a host project takes: the GitHub Action, the pre-commit hook and the table in pyproject.toml.

The shell of the action's steps runs in a folder of its own with a subject of 25 lines, without network: the interpreter
of this run is the job's, and has this project installed.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = ACTION["runs"]["steps"]
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
TEMPLATE = ROOT / "conformance" / "templates" / "numpy_subject.py.txt"
INPUT = re.compile(r"\$\{\{ *inputs\.(\w+) *\}\}")
WRONG = """
from router_subject import MyRouter


class Wrong(MyRouter):
    def route(self, *_):
        return None
"""
FEW = "--stage run --examples 2"


@pytest.fixture
def host(tmp_path) -> Path:
    """A project with a router of 25 lines, and one that is wrong."""
    (tmp_path / "tests").mkdir()
    text = TEMPLATE.read_text()
    (tmp_path / "tests" / "router_subject.py").write_text(text)
    (tmp_path / "tests" / "wrong_subject.py").write_text(WRONG)
    return tmp_path


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command as a runner runs it, with the tools of this interpreter first."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PATH": tools, "PYTHONPATH": paths, "PIP_NO_INDEX": "1"} | variables
    how = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", command]  # as GitHub documents `shell: bash`
    return subprocess.run(how, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def filled(text: str, inputs: dict[str, str]) -> str:
    return INPUT.sub(lambda found: inputs[found[1]], text)


def run_action(folder: Path, place: Path = ROOT, **given: str) -> subprocess.CompletedProcess[str]:
    """The shell of the steps, one after the other, until one fails; its inputs are those given, else the defaults."""
    inputs = {name: each.get("default", "") for name, each in ACTION["inputs"].items()} | given
    runner = {"GITHUB_ACTION_PATH": str(place), "GITHUB_STEP_SUMMARY": str(folder / "step.md")}
    for step in (step for step in STEPS if "run" in step):
        own = {name: filled(text, inputs) for name, text in step.get("env", {}).items()}
        done = shell(step["run"], folder, **runner, **own)
        if done.returncode != 0:
            break
    return done


def blocks(language: str) -> list[str]:
    """The blocks of a language in the page about CI."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)


def steps_of_the_page() -> list[dict]:
    return next(page["steps"] for page in map(yaml.safe_load, blocks("yaml")) if "steps" in page)


def step_of_the_page() -> dict:
    """The step of the page that uses the action."""
    (step,) = (step for step in steps_of_the_page() if "moe-conformance" in step.get("uses", ""))
    return step


def test_the_action_judges_a_subject_and_leaves_summary_and_reports(host):
    step = step_of_the_page()
    place = host / step["uses"]
    place.parent.mkdir(parents=True)
    place.symlink_to(ROOT)
    done = run_action(host, place, subject=step["with"]["subject"], args=FEW)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in (host / ACTION["inputs"]["report"]["default"]).iterdir()}
    assert files == {"report.json", "report.html", "report.md", "junit.xml", "badge.svg"}
    assert "✅ **my-router**" in (host / "step.md").read_text()


def test_the_action_fails_where_the_subject_does_and_runs_no_word_of_an_input(host):
    done = run_action(host, subject="tests/wrong_subject.py:Wrong $(touch ran) ; touch ran", args=FEW)
    assert done.returncode == 4, done.stdout + done.stderr
    assert not (host / "ran").exists()
    done = run_action(host, subject="tests/wrong_subject.py:Wrong", args=FEW, report="a folder")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "❌ **my-router**" in (host / "step.md").read_text()
    assert (host / "a folder" / "report.html").exists()


def test_every_input_of_the_action_is_used_and_every_one_that_is_used_is_there():
    used = {name for step in STEPS for name in re.findall(r"inputs\.(\w+)", str(step))}
    assert used == ACTION["inputs"].keys()
    assert not any(INPUT.search(step["run"]) for step in STEPS if "run" in step), "an input is no text of a script"
    assert all(step.get("shell") == "bash" for step in STEPS if "run" in step)


def test_the_hook_judges_a_subject_as_pre_commit_calls_it(host):
    command = [*shlex.split(HOOK["entry"]), "tests/router_subject.py:MyRouter", *FEW.split()]
    done = shell(shlex.join(command), host)
    assert done.returncode == 0, done.stdout + done.stderr
    assert HOOK["pass_filenames"] is False
    assert {"id", "name", "entry", "language"} <= HOOK.keys()
    assert HOOK["entry"].split()[0] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_the_table_of_the_page_is_one_that_the_plugin_takes(host):
    from conformance.run.plugin import KEYS

    (table,) = (text for text in blocks("toml") if "[tool.moe-conformance]" in text)
    assert tomllib.loads(table)["tool"]["moe-conformance"].keys() <= KEYS
    (host / "pyproject.toml").write_text(table.replace("deviations =", "# deviations ="))
    command = f"{shlex.quote(sys.executable)} -m pytest --pyargs conformance.suite -q -k RUN_1"
    done = shell(command, host, GITHUB_STEP_SUMMARY="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (host / "build" / "moe" / "report.html").exists()


def test_the_yaml_of_the_page_names_inputs_and_hooks_that_there_are():
    found = [yaml.safe_load(text) for text in blocks("yaml")]
    assert step_of_the_page()["with"].keys() <= ACTION["inputs"].keys()
    (hook,) = (h for page in found if "repos" in page for repo in page["repos"] for h in repo["hooks"])
    assert hook["id"] == HOOK["id"]


def test_no_address_of_the_page_is_one_that_there_is_not():
    steps = steps_of_the_page()
    checkout = next(number for number, step in enumerate(steps) if "checkout" in step.get("uses", ""))
    assert checkout < steps.index(step_of_the_page()), "a path is there once it is checked out"
    assert step_of_the_page()["uses"].startswith("./")
    (repo,) = (repo for page in map(yaml.safe_load, blocks("yaml")) if "repos" in page for repo in page["repos"])
    assert not re.match(r"\w+://|git@", repo["repo"])
