"""conformance, `run`: one pytest process for each subject, two at a time, their verdicts shown as they come."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from conformance.core.register import REQUIREMENTS
from conformance.core.usage import UsageError
from conformance.run.deviations import read
from conformance.run.plugin import merge
from conformance.run.report import FAILING, assemble, matrix, table, write
from conformance.run.subjects_by_name import BUILT_IN, DEFAULT, known_names, subject_named

EXIT_NEW = 1
WANTED = {name: name.partition("-")[0] for name in BUILT_IN if name != "reference"}
"""The package that a built-in subject needs."""


@dataclass
class Process:
    """A subject being judged."""

    name: str
    popen: subprocess.Popen
    records_file: Path
    output_file: Path
    started: float = field(default_factory=time.monotonic)
    records: dict = field(default_factory=dict)
    read_to: int = 0
    ended: float | None = None
    error: str = ""
    """What the process says the user gave wrongly."""

    def read(self) -> None:
        """Take in the records that came since the last call."""
        if self.records_file.exists():
            with self.records_file.open() as file:
                file.seek(self.read_to)
                while (line := file.readline()).endswith("\n"):
                    found = json.loads(line)
                    if "error" in found:
                        self.error = found["error"]
                    else:
                        merge(self.records, found)
                    self.read_to = file.tell()

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started


def run_subjects(options) -> int:
    """Judge the subjects of the command line; prints tables, failures and a matrix."""
    for file in options.deviations:
        read(Path(file))  # a usage error here, before anything runs
    names = options.subjects or list(DEFAULT)
    installed = []
    for name in names:
        if (why := _missing(name)) is None:
            installed.append(name)
        elif options.subjects:
            raise UsageError(why)
        else:
            print(f"subject {name} is not judged: {why}")
    with tempfile.TemporaryDirectory(prefix="moe-conformance-") as folder:
        finished = _judge_all(installed, options, Path(folder))
        codes = [process.popen.returncode for process in finished]
        report = _report(finished, options)
        for process in finished:
            if process.error:
                raise UsageError(process.error)
            if process.popen.returncode not in (0, 1):
                print(f"\nsubject {process.name}: the run broke off, exit status {process.popen.returncode}")
                print(process.output_file.read_text()[-4000:])
    _print_failures(report)
    print(matrix(report))
    if options.report:
        write(report, options.report)
        print(f"\nwrote report.json, report.md and junit.xml to {options.report}")
    if options.propose_deviations:
        _propose(report, options.propose_deviations)
    failing = any(r["status"] in FAILING for r in report["requirements"])
    return EXIT_NEW if failing or any(code not in (0, 1) for code in codes) else 0


def _missing(name: str) -> str | None:
    """Why a subject cannot be judged here: a package that is not installed. A wrong name is a UsageError."""
    import importlib.util

    if name in WANTED:
        return None if importlib.util.find_spec(WANTED[name]) else f"{WANTED[name]} is not installed"
    if name not in known_names() and not name.endswith(".py") and ":" not in name:
        subject_named(name)  # raises the usage error with the nearest name
    return None


def _judge_all(names: list[str], options, folder: Path) -> list[Process]:
    """Run the subjects, as many at once as there are cores, at most two; print each table as it is done."""
    waiting, running, finished = list(names), [], []
    at_once = min(2, os.cpu_count() or 1)
    show = sys.stderr.isatty()
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(_start(waiting.pop(0), options, folder, len(finished) + len(running)))
            print(f"judging {running[-1].name} ...", file=sys.stderr, flush=True)
        time.sleep(0.1)
        for process in list(running):
            process.read()
            if process.popen.poll() is None and process.seconds > options.timeout:
                process.popen.kill()
                process.popen.wait()
                process.output_file.write_text(f"killed: no end after {options.timeout} s\n")
            if process.popen.poll() is not None:
                process.read()
                process.ended = time.monotonic()
                running.remove(process)
                finished.append(process)
                _complete(process)
                if process.records:
                    subject = {"name": process.name, "version": _version(process)}
                    print(table(subject, list(process.records.values())) + f" in {process.seconds:.0f} s\n", flush=True)
        if show and running:
            line = "   ".join(f"{p.name} {len(p.records)}/{len(REQUIREMENTS)}, {p.seconds:.0f} s" for p in running)
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
    if show:
        print("\r" + " " * 100 + "\r", end="", file=sys.stderr)
    return sorted(finished, key=lambda process: names.index(process.name))


def _start(name: str, options, folder: Path, number: int) -> Process:
    records, output = folder / f"{number}.jsonl", folder / f"{number}.txt"
    empty = folder / "pytest.ini"
    empty.write_text("[pytest]\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(empty),
        "--rootdir",
        str(folder),
        "--pyargs",
        "conformance.suite",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-W",
        "ignore",
        "-q",
        "--subject",
        name,
        "--moe-records",
        str(records),
    ]
    if options.examples:
        command += ["--moe-examples", str(options.examples)]
    if options.seed is not None:
        command += ["--moe-seed", str(options.seed)]
    for file in options.deviations:
        command += ["--moe-deviations", str(Path(file).resolve())]
    if options.stage:
        command += ["--moe-stage", options.stage]
    with output.open("w") as file:
        popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    return Process(name=name, popen=popen, records_file=records, output_file=output)


def _complete(process: Process) -> None:
    """Name what was not judged, so that a partial run never looks whole."""
    judged = {name for _, name in process.records}
    if process.records:
        subject = next(iter(process.records))[0]
        for r in REQUIREMENTS.values():
            if r.id not in judged:
                process.records[subject, r.id] = {
                    "id": r.id,
                    "subject": subject,
                    "level": r.level,
                    "stage": r.stage,
                    "sentence": r.sentence,
                    "since": r.since,
                    "status": "not judged",
                    "cases": 0,
                    "near_ties": 0,
                    "known": [],
                    "unsupported": [],
                }


def _version(process: Process) -> str:
    return next((r.get("version", "") for r in process.records.values() if r.get("version")), "")


def _report(finished: list[Process], options) -> dict:
    subjects = [
        {"name": next(iter(p.records))[0], "subject": p.name, "version": _version(p), "seconds": round(p.seconds, 1)}
        for p in finished
        if p.records
    ]
    records = [r for p in finished for r in p.records.values()]
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "examples": options.examples,
        "seed": options.seed,
    }
    complete = (
        options.stage is None
        and all(p.popen.returncode in (0, 1) for p in finished)
        and all(r["status"] != "not judged" for r in records)
    )
    return assemble(subjects, records, environment, complete=complete)


def _print_failures(report: dict) -> None:
    for r in report["requirements"]:
        if r["status"] in FAILING and "failure" in r:
            print(f"\n{'-' * 100}\n{r['failure']['page']}")
    if any(r["status"] in FAILING for r in report["requirements"]):
        print(f"\n{'-' * 100}")


def _propose(report: dict, file: Path) -> None:
    """TOML for every new failure; a person fills in reason and link, until then it is refused."""
    witnesses = file.parent / "witnesses"
    lines = ["# Differences from the specification that we know about.", ""]
    for r in report["requirements"]:
        if r["status"] == "NEW":
            failure = r["failure"]
            lines += [
                "[[deviation]]",
                f'requirement = "{r["id"]}"',
                f"when = {json.dumps(failure['tags'])}",
                'kind = "bug"  # bug, by-design or numerics',
                'reason = ""',
                'link = ""',
            ]
            if failure["replay"]:
                witnesses.mkdir(parents=True, exist_ok=True)
                data = {"requirement": r["id"], "subject": r["subject"], "case": failure["case"]}
                (witnesses / f"{failure['replay']}.json").write_text(json.dumps(data, indent=1) + "\n")
                lines.append(f'witness = "{failure["replay"]}"')
            lines.append("")
    file.write_text("\n".join(lines))
    print(f"\nwrote {file}: fill in reason and link of each entry, and drop the tags that do not matter")
