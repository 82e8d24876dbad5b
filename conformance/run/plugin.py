"""conformance, the pytest plugin: `pytest --pyargs conformance.suite --subject path.py:Class`.

Loaded into every pytest run of the environment, so it imports nothing of the project until a suite test is collected.
"""

from __future__ import annotations

# Annotations stay strings: the judge is imported with the suite, not with the plugin.
import gc
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conformance.core.judge import Judge

KEYS = {"subject", "deviations", "examples", "seed", "family", "spec", "tokens", "width", "device", "report"}


def pytest_addoption(parser):
    group = parser.getgroup("moe-conformance")
    group.addoption(
        "--subject",
        action="append",
        default=[],
        metavar="SUBJECT",
        help="what the conformance suite judges: a name, module:Class or path.py:Class; repeatable",
    )
    group.addoption("--moe-deviations", action="append", default=[], metavar="FILE", help="TOML of known deviations")
    group.addoption("--moe-examples", type=int, default=None, metavar="N", help="cases for each requirement")
    group.addoption("--moe-seed", type=int, default=None, metavar="S", help="other cases than the fixed ones")
    group.addoption(
        "--moe-stage",
        action="append",
        default=[],
        metavar="STAGE",
        help="requirements of this stage, or these, alone",
    )
    group.addoption("--moe-family", nargs="+", default=None, metavar="NAME", help="this family's router alone")
    group.addoption("--moe-spec", default=None, metavar="FILE", help="this RouterSpec or LayerSpec alone, as JSON")
    group.addoption("--moe-tokens", type=int, default=None, metavar="N", help="of each case of a family or spec")
    group.addoption("--moe-width", nargs=2, type=int, default=None, metavar="N", help="dim and hidden_dim of its layer")
    group.addoption(
        "--moe-device", default=None, metavar="DEVICE", help="where subjects compute, such as cuda or cuda:1"
    )
    group.addoption(
        "--moe-report",
        default=None,
        metavar="DIR",
        help="write report.json, report.md, report.html and junit.xml there",
    )
    group.addoption("--moe-records", default=None, metavar="FILE", help="append each verdict as a line of JSON")
    group.addoption("--moe-watch", default=None, metavar="FILE", help="keep in it which case is tried")
    group.addoption(
        "--moe-resume", default=None, metavar="FILE", help="JSON: tests that are done, those that broke, those left"
    )
    group.addoption(
        "--moe-claims",
        nargs=2,
        default=None,
        metavar=("DIR", "N"),
        help="judge the stages that this process, the Nth, claims there, and leave what it finds for a later one",
    )


def _settings(config) -> dict:
    """Options of the command line before those of [tool.moe-conformance] in the host's pyproject.toml."""
    file = config.rootpath / "pyproject.toml"
    table = tomllib.loads(file.read_text()).get("tool", {}).get("moe-conformance", {}) if file.exists() else {}
    if unknown := table.keys() - KEYS:
        from conformance.core.usage import UsageError
        from moe_ref.specs.checks import nearest

        key = sorted(unknown)[0]
        raise UsageError(f"[tool.moe-conformance] in {file}: unknown key {key!r}{nearest(key, KEYS)}")

    def listed(value) -> list[str]:
        return [value] if isinstance(value, str) else list(value)

    option = config.getoption
    return {
        "subjects": option("--subject") or listed(table.get("subject", [])),
        "deviations": option("--moe-deviations")
        or [str(config.rootpath / f) for f in listed(table.get("deviations", []))],
        "examples": option("--moe-examples") or table.get("examples"),
        "seed": option("--moe-seed") if option("--moe-seed") is not None else table.get("seed"),
        "family": option("--moe-family") or listed(table.get("family", [])) or None,
        "file": _path(option("--moe-spec"), config.invocation_params.dir) or _path(table.get("spec"), config.rootpath),
        "tokens": option("--moe-tokens") or table.get("tokens"),
        "width": option("--moe-width") or table.get("width"),
        "device": option("--moe-device") or table.get("device"),
        "report": _path(option("--moe-report"), config.invocation_params.dir)
        or _path(table.get("report"), config.rootpath),
    }


def _path(file, folder):
    return None if file is None else Path(folder) / file


class Session:
    """The judges of a pytest run, made when the first suite test is collected."""

    def __init__(self, config):
        from conformance.core.chosen import chosen
        from conformance.core.judge import Judge
        from conformance.core.trial import DEFAULT_EXAMPLES
        from conformance.core.usage import UsageError
        from conformance.run.subjects_by_name import declared, subject_named

        settings = _settings(config)
        only = chosen(**{name: settings[name] for name in ("family", "file", "tokens", "width")})
        if not settings["subjects"]:
            raise UsageError("the conformance suite needs --subject, or subject in [tool.moe-conformance]")
        examples = DEFAULT_EXAMPLES if settings["examples"] is None else settings["examples"]
        if not isinstance(examples, int) or examples < 1:
            raise UsageError(f"examples is {examples!r}; it is an integer of at least 1")
        self.judges: dict[str, Judge] = {}
        for name in settings["subjects"]:
            subject = subject_named(name, settings["device"])
            if settings["family"] and settings["family"][0] in getattr(subject, "families", ()):
                setattr(subject, "family", settings["family"][0])  # noqa: B010  (of several real routers, its own)
            judge = Judge(subject, declared(name, settings["deviations"]), only)
            self.judges[judge.name] = judge
        self.seed, self.examples = settings["seed"], examples

    def as_test(self, requirement: str):
        """The hypothesis test of a requirement with the settings of this run."""
        from conformance.core.check import CHECKS
        from conformance.core.trial import as_test

        return as_test(CHECKS[requirement], examples=self.examples, seed=self.seed)


def _session(config) -> Session:
    if not hasattr(config, "_moe_session"):
        config._moe_session = Session(config)
    return config._moe_session


def _append(file: str, record: dict) -> None:
    with open(file, "a") as lines:
        lines.write(json.dumps(record) + "\n")


def _in_suite(module) -> bool:
    return getattr(module, "__name__", "").startswith("conformance.suite")


def pytest_generate_tests(metafunc):
    if "judge" in metafunc.fixturenames and _in_suite(metafunc.module):
        from conformance.core.usage import UsageError

        judges = {}
        if not hasattr(metafunc.config, "_moe_error"):
            try:
                judges = _session(metafunc.config).judges
            except (UsageError, ImportError) as error:
                metafunc.config._moe_error = str(error)  # raised once, below, not for each file
        metafunc.parametrize("judge", judges.values(), ids=judges.keys(), scope="session")


def pytest_collection_modifyitems(config, items):
    if error := getattr(config, "_moe_error", None):
        if file := config.getoption("--moe-records"):
            _append(file, {"error": error})
        raise pytest.UsageError(error)
    mine = [item for item in items if _in_suite(getattr(item, "module", None))]
    for item in mine:
        if hasattr(item.obj, "requirement"):
            item.obj = _session(config).as_test(item.obj.requirement)
    if stages := config.getoption("--moe-stage"):
        from conformance.core.register import REQUIREMENTS, STAGES
        from moe_ref.specs.checks import nearest

        for stage in stages:
            if stage not in STAGES:
                raise pytest.UsageError(f"--moe-stage {stage!r} is no stage{nearest(stage, STAGES)}")
        wanted = {name for name, requirement in REQUIREMENTS.items() if requirement.stage in stages}
        others = [item for item in mine if getattr(item.obj, "requirement", None) not in wanted]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)
    if file := config.getoption("--moe-resume"):
        _resume(config, items, json.loads(Path(file).read_text()))
    if given := config.getoption("--moe-claims"):
        from conformance.run.sharing import Claims

        config._moe_claims = Claims(Path(given[0]), int(given[1]))
        config._moe_claims.order(items)


def _resume(config, items, state: dict) -> None:
    """Leave out the tests that are done; those on which a process broke are violations."""
    from conformance.run.watch import broken, found_before

    done = [item for item in items if item.name in state["done"]]
    items[:] = [item for item in items if item not in done]
    config.hook.pytest_deselected(items=done)
    for item in items:
        if item.name in state["broken"]:
            item.obj = broken(item.obj, **state["broken"][item.name])
        elif item.name in state["left"]:
            item.obj = found_before(item.obj, **state["left"][item.name])


def search_cycles_rarely(config):
    """Of a run a tenth of the time is Python's search for cycles: from here on it is rarer, and not in the modules."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    config.add_cleanup(gc.unfreeze)  # else libraries report what is left at the end as leaks


def pytest_collection_finish(session):
    """The processes of `run` are ours alone."""
    if session.config.getoption("--moe-watch"):
        search_cycles_rarely(session.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Nothing happens to a test that another process has claimed."""
    claims = getattr(item.config, "_moe_claims", None)
    return True if claims is not None and _in_suite(item.module) and not claims.has(item) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The record of a requirement is of its own test alone, whichever tests ran in this process before."""
    if not _in_suite(getattr(item, "module", None)):
        return
    from conformance.core.judge import Entry
    from conformance.run.watch import Watch

    judge = item.callspec.params["judge"]
    if requirement := getattr(item.obj, "requirement", None):
        judge.ledger[requirement] = Entry()
    if file := item.config.getoption("--moe-watch"):
        if not hasattr(item.config, "_moe_watch"):
            item.config._moe_watch = Watch(file)
        item.config._moe_watch.begin(item.name)
        judge.watch, type(judge).lost = item.config._moe_watch.enter, item.config._moe_watch.lost


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when != "call" or not _in_suite(getattr(item, "module", None)):
        return report
    from conformance.run.conclude import conclude

    judge = item.callspec.params["judge"]
    requirement = getattr(item.obj, "requirement", None)
    if hasattr(item.config, "_moe_claims"):
        from conformance.run.sharing import what_was_found

        if found := what_was_found(judge, requirement, call.excinfo):
            report.outcome, report.longrepr, report.moe_left = "passed", None, found
            return report
    records = conclude(judge, requirement, call.excinfo)
    for record in records:
        if record["id"] == requirement:
            record["seconds"] = round(call.duration, 2)
            # pytest writes them to the XML of --junitxml.
            item.user_properties += [("requirement", requirement), ("status", record["status"])]
    report.moe_records = records
    _restate(report, records, judge)
    return report


def _restate(report, records: list[dict], judge: Judge) -> None:
    """The outcome of the pytest test: SHOULD never fails, unsupported never passes."""
    pages = [_page(r) for r in records if r["status"] in ("NEW", "STALE") and "failure" in r]
    if pages:
        report.outcome, report.longrepr = "failed", "\n\n".join(pages)
    elif any(r["status"] == "advice" for r in records):
        report.outcome, report.wasxfail = "skipped", "a SHOULD that does not hold"
    elif records and all(r["status"] == "unsupported" for r in records) and report.outcome == "passed":
        reason = "; ".join(records[0]["unsupported"]) or "no case could be run"
        report.outcome, report.longrepr = (
            "skipped",
            (report.location[0], report.location[1] or 0, f"unsupported: {reason}"),
        )


def _page(record: dict) -> str:
    """The page of a record, or where it is."""
    first = record["failure"]["first"]
    if first is None:
        return record["failure"]["page"]
    title = f"{record['id']} {record['level']}  {record['sentence']}"
    return f"{title}\n\n    {record['failure']['title']}: see the page of {first['requirement']}, {first['why']}"


def pytest_configure(config):
    config.pluginmanager.register(Collector(config), "moe-conformance-collector")


class Collector:
    """Gathers the records of all tests, of xdist workers too, and prints the table of requirements at the end."""

    def __init__(self, config):
        self.config, self.records = config, {}

    def pytest_runtest_logreport(self, report):
        worker = hasattr(self.config, "workerinput")
        for record in getattr(report, "moe_records", ()):
            merge(self.records, record)
            if self.config.getoption("--moe-records") and not worker:
                _append(self.config.getoption("--moe-records"), record)
        if report.when == "call" and self.config.getoption("--moe-records") and not worker:
            left = getattr(report, "moe_left", None)
            name = report.nodeid.rpartition("::")[2]
            _append(self.config.getoption("--moe-records"), {"done": name} if left is None else {"left": name} | left)

    def pytest_sessionfinish(self, session, exitstatus):
        failed = any(record["status"] in ("NEW", "STALE") for record in self.records.values())
        if failed and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.records or self.config.getoption("--moe-records"):
            return
        from conformance.run.report import table

        names = sorted({record["subject"] for record in self.records.values()})
        for name in names:
            mine = [record for record in self.records.values() if record["subject"] == name]
            terminalreporter.section("moe conformance")
            terminalreporter.write_line(table({"name": name, "version": ""}, mine))
        for file in self._write_views(names):
            terminalreporter.write_line(f"wrote {file}")

    def _write_views(self, names: list[str]) -> list[Path]:
        """The folder that was asked for, and the summary of a GitHub job."""
        from conformance.run.report import assemble, fact, not_judged
        from conformance.run.views import step_summary, write_folder, write_summary

        folder, step = _settings(self.config)["report"], step_summary()
        if folder is None and step is None:
            return []
        records, subjects = list(self.records.values()), []
        for name in names:
            mine = [r for r in records if r["subject"] == name]
            subjects.append({"name": name} | {key: fact(mine, key) for key in ("version", "where")})
            records += not_judged(name, mine)
        complete = all(r["status"] != "not judged" for r in records)
        report = assemble(subjects, records, {}, complete=complete)
        if step is not None:
            write_summary(report, step)
        if folder is None:
            return []
        write_folder(report, folder)
        return [folder / "report.html"]


def merge(records: dict, record: dict) -> None:
    """Add a record to those by (subject, id); of two for one requirement the worse verdict stays."""
    worst_first = ("NEW", "STALE", "advice", "known", "ok", "unsupported", "not judged")
    key = (record["subject"], record["id"])
    old = records.get(key)
    if old is None or worst_first.index(record["status"]) <= worst_first.index(old["status"]):
        records[key] = record
