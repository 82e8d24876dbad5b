"""tests of the judge: the command line and the pytest plugin as a user meets them.

What starts processes or has an exit status is a process here; what only reads and prints is called.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Entry, Judge
from conformance.core.register import MUST, REQUIREMENTS, SPEC_VERSION, of_stage
from conformance.core.trial import accuse
from conformance.core.usage import UsageError
from conformance.router.kind import ROUTER
from conformance.run import plugin
from conformance.run.cli import main
from conformance.run.subjects_by_name import subject_named
from conformance.subjects.reference import Reference
from conformance.suite import test_requirements

ROUTERS = Path(__file__).with_name("routers.py")
EXAMPLES = 60
"""As many as a run has; with 40 the zero mask is missed at SEL-3."""
WITNESS_TAGS = ["grouped", "negative_choice"]


def moe(*arguments, cwd, code: int) -> str:
    """The output of a command that ends with this exit status."""
    command = [sys.executable, "-m", "conformance.run.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def called(*arguments, cwd, code: int) -> str:
    """The output of a command that ends with this exit status, without a process: for those that start none."""
    printed = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main([*map(str, arguments)])
        except SystemExit as ended:  # argparse
            status = ended.code
    assert status == code, printed.getvalue()
    return printed.getvalue()


def run(name: str, *options, cwd, code: int) -> str:
    return moe("run", f"{ROUTERS}:{name}", "--examples", EXAMPLES, *options, cwd=cwd, code=code)


def test_a_right_router_is_accused_of_nothing_whatever_tests_its_folder_has(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("raise SystemError('a run reads this')\n")
    printed = run("Sigmoid", "--stage", "score", "--stage", "select", cwd=tmp_path, code=0)
    assert "0 NEW" in printed
    assert "ok          SEL-3   An expert of a dropped group is never selected" in printed
    assert "unsupported sigmoid, top-2 groups, sum norm and scale alone: " in printed
    assert "ok          SCR-3 " not in printed


@pytest.fixture(scope="module")
def accused(tmp_path_factory) -> tuple[Path, str]:
    """A folder with all that a run writes of the wrong router, and what it prints."""
    folder = tmp_path_factory.mktemp("accused")
    views = ("--html", "page.html", "--summary", "summary.md", "--badge", "badge.svg")
    written = ("--report", "out", *views, "--propose-deviations", "known.toml")
    return folder, run("MaskedZero", "--stage", "select", *written, cwd=folder, code=1)


def test_a_wrong_router_is_accused_with_a_page_a_replay_and_reports(accused):
    folder, printed = accused
    assert (folder / "page.html").read_text() == (folder / "out" / "report.html").read_text()
    assert "partial" in (folder / "badge.svg").read_text()
    assert "first failure is in stage **select**" in (folder / "summary.md").read_text()
    assert "NEW         SEL-3" in printed
    assert "not judged  SCR-1 .. SCR-" in printed
    page = printed[printed.index("SEL-3 MUST") :]
    for part in ("expected", "received", "of dropped groups", "huggingface/transformers#45440", "looks like"):
        assert part in page
    report = json.loads((folder / "out" / "report.json").read_text())
    failure = next(r for r in report["requirements"] if r["id"] == "SEL-3")["failure"]
    assert not report["complete"]
    assert len(failure["case"]["logits_TE"]) == 1, "the smallest case has one token"
    suites = ET.parse(folder / "out" / "junit.xml").getroot()
    assert int(suites[0].attrib["failures"]) >= 1
    assert "SEL-3 NEW" in (folder / "out" / "report.md").read_text()
    replayed = called("replay", failure["replay"], "--subject", f"{ROUTERS}:MaskedZero", cwd=folder, code=1)
    assert "reference" in replayed
    assert "holds SEL-3" in called("replay", failure["replay"], "--subject", f"{ROUTERS}:Sigmoid", cwd=folder, code=0)


def requirements_of(report: Path) -> dict[str, dict]:
    """id -> record, of a report."""
    return {r["id"]: r for r in json.loads((report / "report.json").read_text())["requirements"]}


def test_the_version_is_that_of_the_package_and_of_the_specification(tmp_path):
    printed = called("--version", cwd=tmp_path, code=0)
    assert printed.startswith("moe-conformance ")
    assert printed.strip().endswith(f"specification {SPEC_VERSION}")


def test_a_should_that_does_not_hold_has_a_page_where_advice_is_asked_for(tmp_path):
    few = ("--stage", "select", "--examples", 4)
    plain = run("Ascending", *few, cwd=tmp_path, code=0)
    assert "advice      SEL-6" in plain
    assert "SEL-6 SHOULD" not in plain
    assert "slowest" not in plain
    printed = run("Ascending", *few, "--advice", "--durations", cwd=tmp_path, code=0)
    page = printed[printed.index("SEL-6 SHOULD") :]
    assert "ascending: " in page
    assert "moe-conformance replay SEL-6-" in page
    stage, slowest = printed.index("  select "), printed.index("  slowest   SEL-")
    assert stage < slowest < printed.index("SEL-6 SHOULD")


def test_requirements_of_a_method_that_is_not_defined_share_one_line(tmp_path):
    printed = run("Sigmoid", "--stage", "permute", cwd=tmp_path, code=0)
    ids = [name for name in of_stage("permute") if CHECKS[name].method == "permute"]
    line = f"unsupported permute() is not defined: {ids[0]} .. {ids[-1]}, {len(ids)} requirements"
    assert [text.strip() for text in printed.splitlines() if "unsupported PRM" in text or "permute()" in text] == [line]


def is_running(pid: int) -> bool:
    """Whether a process is there, and is not one that nobody has fetched the exit status of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "options", "title", "received"),
    [
        ("Hanging", ("--limit", 3), "did not return within 3 s", "routers.py"),
        ("Ending", ("--stage", "gate", "--processes", 2), "ended the process, exit status 7", "nothing was printed"),
        ("Losing", (), "lost the device: in that process nothing runs on it any more", "illegal memory access"),
    ],
)
def test_a_subject_that_hangs_or_dies_is_accused_by_its_case_and_the_rest_is_judged(
    name, options, title, received, tmp_path
):
    few = ("--stage", "run", "--examples", 2)
    printed = run(name, *few, *options, "--report", "out", cwd=tmp_path, code=1)
    found = requirements_of(tmp_path / "out")
    assert f"{name.lower()}: {title}" in printed
    assert found["RUN-2"]["status"] == "NEW"
    failure = found["RUN-2"]["failure"]
    assert failure["title"] == title
    assert received in failure["received"]
    assert failure["case"]["logits_TE"] == []
    others = {name: found[name]["status"] for name in of_stage("run") if name != "RUN-2"}
    assert others == {name: "unsupported" if name == "RUN-6" else "ok" for name in others}
    pids = (tmp_path / "pids.txt").read_text().split() if name == "Hanging" else []
    assert [pid for pid in pids if is_running(int(pid))] == []


def test_a_run_that_is_cut_tells_what_it_has_found(tmp_path):
    some = ("--stage", "run", "--stage", "groups", "--examples", 2, "--processes", 2, "--timeout", 12)
    printed = run("Late", *some, "--report", "out", cwd=tmp_path, code=1)
    assert re.search(r"killed: no end after 12 s, in .*test_run_RUN_2_", printed)
    found = requirements_of(tmp_path / "out")
    assert (found["RUN-1"]["status"], found["RUN-2"]["status"]) == ("NEW", "not judged")
    assert found["RUN-1"]["failure"]["title"] == "raised an error"
    assert "kernel launch failed" in found["RUN-1"]["failure"]["page"]


HIDING = """
from importlib.metadata import Distribution

discover = Distribution.discover
Distribution.discover = lambda **how: (each for each in discover(**how) if each.metadata["Name"] != "moe-conformance")
"""


def test_a_checkout_that_is_not_installed_judges_too(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROUTERS.parents[2]))))
    assert "moe-conformance of a checkout, specification" in moe("--version", cwd=tmp_path, code=0)
    run("Sigmoid", "--stage", "gate", "--report", "out", cwd=tmp_path, code=0)
    assert requirements_of(tmp_path / "out")


def test_two_processes_find_what_one_finds(tmp_path):
    some = ("--stage", "groups", "--stage", "select", "--examples", 2)
    found = []
    for processes in (1, 2):
        run("MaskedZero", *some, "--processes", processes, "--report", processes, cwd=tmp_path, code=1)
        records = requirements_of(tmp_path / str(processes))
        found.append({name: {**record, "seconds": 0} for name, record in records.items()})
    assert found[0] == found[1]
    assert any("first" in record.get("failure", {}) for record in found[0].values())


def test_a_record_is_of_its_own_test_alone():
    judge = Judge(Reference())
    judge.ledger["SEL-1"].known[object()] = judge.ledger["SEL-2"].judged = 1  # as other tests leave it that blame these
    test = SimpleNamespace(
        module=test_requirements, obj=SimpleNamespace(requirement="SEL-1"),
        callspec=SimpleNamespace(params={"judge": judge}), config=SimpleNamespace(getoption=lambda name: None),
    )  # fmt: skip
    plugin.pytest_runtest_setup(test)
    assert judge.ledger["SEL-1"] == Entry()
    assert judge.ledger["SEL-2"].judged == 1


def test_what_is_found_once_is_told_though_the_subject_is_right_when_asked_again(tmp_path):
    some = ("--stage", "gate", "--stage", "groups", "--examples", 5, "--processes", 2)
    printed = run("Once", *some, cwd=tmp_path, code=1)
    assert "asked again for the same, the subject returned something else" in printed


def test_a_run_that_is_terminated_leaves_nothing_running(tmp_path):
    command = [sys.executable, "-m", "conformance.run.cli", "run", f"{ROUTERS}:Hanging", "--stage", "run"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    written = tmp_path / "pids.txt"
    try:
        while not (written.is_file() and written.read_text()) and running.poll() is None:
            time.sleep(0.05)
        running.terminate()
        assert running.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        running.kill()
    assert [pid for pid in written.read_text().split() if is_running(int(pid))] == []


RECORDING = """

class Recording(Sigmoid):
    name = "recording"

    def route(self, logits_TE, spec, expert_bias_E):
        with open("drawn.txt", "a") as file:
            print(len(logits_TE), logits_TE.sum(), spec, file=file)
        return super().route(logits_TE, spec, expert_bias_E)

"""


def test_constants_of_the_subjects_file_change_no_case(tmp_path):
    # hypothesis mixes the literals of a user's modules into the integers that it draws, one time in forty.
    drawn, reports = [], []
    for number, constants in enumerate(("", f"MORE = {tuple(range(10**6, 10**6 + 200))}\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "router.py").write_text(ROUTERS.read_text() + RECORDING + constants)
        few = ("--stage", "run", "--examples", 20, "--report", "out")
        moe("run", "router.py:Recording", *few, cwd=folder, code=0)
        drawn.append((folder / "drawn.txt").read_text())
        found = requirements_of(folder / "out")
        reports.append({name: (r["status"], r["cases"]) for name, r in found.items()})
    assert drawn[0] == drawn[1]
    assert reports[0] == reports[1]


def a_report(folder: Path, **statuses: str) -> Path:
    """A folder with a report of these statuses."""
    rows = [{"subject": "router", "id": name.replace("_", "-"), "status": s} for name, s in statuses.items()]
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"requirements": rows}))
    return folder


def test_two_reports_are_compared_requirement_by_requirement(tmp_path):
    before = a_report(tmp_path / "before", SEL_3="ok", SEL_4="ok", WGT_2="NEW")
    after = a_report(tmp_path / "after", SEL_3="NEW", WGT_2="NEW", WGT_3="ok")
    printed = called("compare", before, before / "report.json", cwd=tmp_path, code=0)
    assert printed == "3 verdicts before, 3 after, 0 differ\n"
    lines = called("compare", before, after, cwd=tmp_path, code=1).splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["router", "SEL-3", "ok", "->", "NEW"],
        ["router", "SEL-4", "ok", "->", "absent"],
        ["router", "WGT-3", "absent", "->", "ok"],
    ]
    assert lines[-1] == "3 verdicts before, 3 after, 3 differ"


def test_what_is_no_report_is_a_usage_error(tmp_path):
    before = a_report(tmp_path / "before", SEL_3="ok")
    assert "nowhere: No such file" in called("compare", before, "nowhere", cwd=tmp_path, code=4)
    (tmp_path / "other.json").write_text("[]")
    assert "is none that `run --report` wrote" in called("compare", before, "other.json", cwd=tmp_path, code=4)


@pytest.fixture
def proposed(accused) -> Path:
    """The folder with the proposed deviations of the wrong router, before anybody filled them in."""
    return accused[0]


def test_a_proposal_is_refused_until_reason_and_link_are_filled_in(proposed):
    refused = ("run", f"{ROUTERS}:MaskedZero", "--deviations", "known.toml")
    assert "has no reason" in moe(*refused, cwd=proposed, code=4)
    assert "has no reason" in called(*refused, cwd=proposed, code=4)


def filled_in(proposed: Path, name: str) -> str:
    text = (proposed / "known.toml").read_text()
    lines = []
    for line in text.splitlines():
        if line.startswith("when"):
            line = f"when = {json.dumps(WITNESS_TAGS)}" if "negative_choice" in line else "when = ['grouped']"
        line = line.replace('reason = ""', 'reason = "Dropped groups are filled with 0."')
        lines.append(line.replace('link = ""', 'link = "https://github.com/huggingface/transformers/issues/45440"'))
    (proposed / name).write_text("\n".join(lines) + "\n")
    return name


def test_declared_failures_are_known_and_gone_ones_are_stale(proposed):
    file = filled_in(proposed, "filled.toml")
    printed = run("MaskedZero", "--stage", "select", "--deviations", file, cwd=proposed, code=0)
    assert "0 NEW" in printed
    assert "known       SEL-3" in printed
    # Its witness decides, no case that is drawn.
    printed = run("Sigmoid", "--examples", 1, "--deviations", file, cwd=proposed, code=1)
    assert "STALE       SEL-3" in printed
    assert "no longer happens; delete the declaration" in printed


def test_an_expired_declaration_fails(proposed):
    file = filled_in(proposed, "expired.toml")
    text = (proposed / file).read_text().replace('kind = "bug"', 'until = 2020-01-31\nkind = "bug"')
    (proposed / file).write_text(text)
    wrong = ("--subject", f"{ROUTERS}:MaskedZero", "--moe-deviations", file)
    assert "ran out on 2020-01-31" in pytest_run(*wrong, "-k", "declared_deviation", cwd=proposed, code=1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("requirement =", "requirment =", "did you mean requirement"),
        ('"SEL-3"', '"SEL-333"', "unknown requirement 'SEL-333' (did you mean SEL-3"),
        ('"grouped"', '"groupd"', "unknown tag 'groupd' (did you mean grouped?)"),
        ("[[deviation]]", "[[deviations]]", "did you mean deviation?"),
        ('witness = "SEL-3', 'witness = "SEL-9', "No such file"),
    ],
)
def test_a_mistyped_declaration_is_a_usage_error_with_the_nearest_name(proposed, old, new, message):
    file = filled_in(proposed, "mistyped.toml")
    (proposed / file).write_text((proposed / file).read_text().replace(old, new))
    assert message in called("run", f"{ROUTERS}:MaskedZero", "--deviations", file, cwd=proposed, code=4)


def test_a_crash_is_a_violation_with_the_error_and_its_place(tmp_path):
    printed = run("Crashing", "--stage", "run", "--examples", 2, cwd=tmp_path, code=1)
    assert "NEW         RUN-1" in printed
    assert "RuntimeError: kernel launch failed" in printed
    assert "routers.py" in printed


def test_a_judgement_that_breaks_off_is_never_a_pass(tmp_path):
    printed = run("Interrupting", "--stage", "select", cwd=tmp_path, code=1)
    assert "the judge broke off: TypeError: supports() is broken" in printed
    assert " ok " not in printed


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("nowhere.py:Router", "there is no file nowhere.py"),
        ("no_such_module:Router", "there is no module 'no_such_module'"),
        (f"{ROUTERS}:Sigmoidd", "did you mean Sigmoid?"),
        (f"{ROUTERS}:np", "is no subclass of conformance.Subject"),
        (f"{ROUTERS}:Empty", "route() is enough to start"),
    ],
)
def test_a_subject_that_is_none_is_a_usage_error(subject, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        subject_named(subject)


def test_a_usage_error_is_one_of_the_run_wherever_it_is_found(tmp_path):
    assert "did you mean jax?" in called("run", "jacks", cwd=tmp_path, code=4)  # before a process is started
    assert "did you mean Sigmoid?" in moe("run", f"{ROUTERS}:Sigmoidd", cwd=tmp_path, code=4)  # in one


def test_a_mistyped_command_or_stage_is_a_usage_error(tmp_path):
    assert "did you mean run?" in moe("rn", cwd=tmp_path, code=4)
    assert "did you mean select?" in called("run", "--stage", "selct", cwd=tmp_path, code=4)


def test_some_stages_alone_are_judged_and_the_others_are_a_line_each(tmp_path):
    some = ("--stage", "gate", "--stage", "mask", "--examples", 4)
    printed = moe("run", "reference", *some, cwd=tmp_path, code=0)
    assert "ok          GAT-1 " in printed
    assert "ok          MSK-1 " in printed
    assert "not judged  SEL-1 .. " in printed


def pytest_run(*arguments, cwd, code: int) -> str:
    command = [sys.executable, "-m", "pytest", "--pyargs", "conformance.suite", "-q", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_suite_runs_under_pytest_with_a_subject(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    printed = pytest_run(
        "--subject", f"{ROUTERS}:MaskedZero", "--moe-examples", EXAMPLES, "-k", "dropped", cwd=tmp_path, code=1
    )
    assert "SEL-3 MUST" in printed
    assert "Traceback" not in printed


def test_a_host_needs_one_table_in_its_pyproject_and_xdist_works(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    table = f"[tool.moe-conformance]\nsubject = '{ROUTERS}:Sigmoid'\nexamples = 8\nreport = 'out'\n"
    (tmp_path / "pyproject.toml").write_text(table)
    printed = pytest_run("-n", 2, "-k", "groups", "--junitxml", "pytest.xml", cwd=tmp_path, code=0)
    assert "ok          GRP-1" in printed
    assert "wrote " in printed
    assert requirements_of(tmp_path / "out")["GRP-1"]["status"] == "ok"
    assert (tmp_path / "out" / "report.html").exists()
    assert "✅ **right** 1: " in (tmp_path / "step.md").read_text()
    properties = {(p.attrib["name"], p.attrib["value"]) for p in ET.parse(tmp_path / "pytest.xml").iter("property")}
    assert ("requirement", "GRP-1") in properties


def test_an_unknown_key_of_the_host_is_a_usage_error(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.moe-conformance]\nsubjct = 'reference'\n")
    command = [sys.executable, "-m", "pytest", "--pyargs", "conformance.suite", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert "did you mean subject?" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_a_new_subject_has_25_lines_and_holds_what_it_supports(kind, tmp_path):
    text = called("new-subject", kind, cwd=tmp_path, code=0)
    assert len([line for line in text.splitlines() if line.strip()]) <= 25
    (tmp_path / "router.py").write_text(text)
    # JAX compiles each operation anew for each size: a router of one size.
    one = ("--stage", "weights", "--family", "qwen3_moe", "--tokens", 3)
    how = ("--stage", "select") if kind == "numpy" else one
    printed = moe("run", "router.py:MyRouter", "--examples", 4, *how, cwd=tmp_path, code=0)
    assert "0 NEW" in printed
    assert f"ok          {'SEL-1' if kind == 'numpy' else 'WGT-2'}" in printed


def test_the_new_subject_of_numpy_holds_whatever_is_asked_of_a_router(tmp_path):
    (tmp_path / "router.py").write_text(called("new-subject", "numpy", cwd=tmp_path, code=0))
    judge = Judge(subject_named(f"{tmp_path}/router.py:MyRouter"))
    must = [name for name in of_stage(*ROUTER.stages) if REQUIREMENTS[name].level == MUST]
    assert accuse(judge, examples=12, ids=must) == {}
    assert judge.ledger["WGT-2"].judged > 12


def test_a_reader_that_has_enough_ends_the_command_without_a_word(tmp_path):
    line = f"{sys.executable} -m conformance.run.cli spec | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout) == ("", "141\n")
