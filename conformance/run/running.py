"""conformance, `run`: subjects judged one after the other, by two processes, their verdicts shown as they come."""

import json
import os
import platform
import tempfile
import time
from pathlib import Path

from conformance.core.chosen import chosen
from conformance.core.usage import UsageError
from conformance.run.deviations import read, write_case_data
from conformance.run.judging import Judging, status
from conformance.run.progress import Progress
from conformance.run.report import FAILING, assemble, durations, fact, is_told_elsewhere, matrix, not_judged, table
from conformance.run.subjects_by_name import BUILT_IN, DEFAULT, STARTED_FIRST, known_names, subject_named
from conformance.run.views import write_folder, write_views

EXIT_NEW = 1
WANTED = {name: name.partition("-")[0] for name in BUILT_IN if name != "reference"}
"""The package that a built-in subject needs."""


HOW = {
    name: f"it has an environment of its own, of Python {python}, which `make peers` builds (docs/{name}.md)"
    for name, python in (("maxtext", "3.12"), ("megatron", "3.12"))
}
"""Of packages that no extra of ours installs: what is needed."""


def run_subjects(options) -> int:
    """Judge the subjects of the command line; prints tables, failures and a matrix."""
    for file in options.deviations:
        read(Path(file))  # a usage error here, before anything runs
    chosen(family=options.family, file=options.spec, tokens=options.tokens, width=options.width)
    names = options.subjects or list(DEFAULT)
    installed = []
    for name in names:
        if (why := missing(name)) is None:
            installed.append(name)
        elif options.subjects:
            raise UsageError(why)
        else:
            print(f"subject {name} is not judged: {why}")
    with tempfile.TemporaryDirectory(prefix="moe-conformance-") as folder:
        finished = _judge_all(installed, options, Path(folder))
        report = _report(finished, options)
        for judging in finished:
            if judging.error:
                raise UsageError(judging.error)
            if judging.code not in (0, 1):
                print(f"\nsubject {judging.name}: the run broke off, {status(judging.code)}")
                print(judging.output[-4000:])
    _print_pages(report, (*FAILING, *(["advice"] if options.advice else [])))
    print(matrix(report))
    if options.report:
        write_folder(report, options.report)
        print(f"\nwrote report.json, report.md, report.html and junit.xml to {options.report}")
    for file in write_views(report, options):
        print(f"\nwrote {file}")
    if options.propose_deviations:
        _propose(report, options.propose_deviations)
    failing = any(r["status"] in FAILING for r in report["requirements"])
    return EXIT_NEW if failing or any(each.code not in (0, 1) for each in finished) else 0


def missing(name: str) -> str | None:
    """Why a subject cannot be judged here: a package that is not installed. A wrong name is a UsageError."""
    import importlib.util

    if name in WANTED:
        package = WANTED[name]
        how = f"; {HOW[package]}" if package in HOW else ""
        return None if importlib.util.find_spec(package) else f"{package} is not installed{how}"
    if name not in known_names() and not name.endswith(".py") and ":" not in name:
        subject_named(name)  # raises the usage error with the nearest name
    return None


def _judge_all(names: list[str], options, folder: Path) -> list[Judging]:
    """Judge the subjects, as many processes at once as there are cores, at most two; print each table as it is done.

    At most four where a device computes: the time is that of compilation.
    """
    at_once = options.processes or min(4 if options.device else 2, os.cpu_count() or 1)
    processes = at_once if len(options.stage) != 1 else 1
    place = {name: number for number, name in enumerate(STARTED_FIRST)}
    judged = []
    for number, name in enumerate(sorted(names, key=lambda name: place.get(name, -1))):
        (folder / str(number)).mkdir()
        judged.append(Judging(name=name, folder=folder / str(number), options=options, processes=processes))
    show, going = Progress(), list(judged)
    try:
        while going:
            while sum(len(j.running) for j in going) < at_once and (able := [j for j in going if j.wants_one]):
                if able[0].started is None:
                    show.say(f"judging {able[0].name} ...")
                able[0].start()
            time.sleep(0.1)
            for judging in [each for each in going if each.look()]:
                going.remove(judging)
                _complete(judging)
                show.clear()
                if judging.records:
                    records = list(judging.records.values())
                    facts = {name: fact(records, name) for name in ("version", "where")}
                    subject = {"name": judging.name} | facts
                    print(table(subject, records) + f" in {judging.seconds:.0f} s\n", flush=True)
                    if options.durations:
                        print(durations(records) + "\n", flush=True)
            show.update([(j.name, len(j.records), j.seconds) for j in going if j.running])
    finally:
        for judging in going:  # where the user breaks off
            judging.end()
        show.clear()
    return sorted(judged, key=lambda judging: names.index(judging.name))


def _complete(judging: Judging) -> None:
    """Name what was not judged."""
    if judging.records:
        subject = next(iter(judging.records))[0]
        for r in not_judged(subject, judging.records.values()):
            judging.records[subject, r["id"]] = r


def _report(finished: list[Judging], options) -> dict:
    subjects = [
        {
            "name": next(iter(p.records))[0],
            "subject": p.name,
            "version": fact(p.records.values(), "version"),
            "where": fact(p.records.values(), "where"),
            "seconds": round(p.seconds, 1),
        }
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
        "family": options.family,
        "spec": str(options.spec) if options.spec else None,
        "device": options.device,
    }
    complete = (
        not options.stage
        and all(p.code in (0, 1) for p in finished)
        and all(r["status"] != "not judged" for r in records)
    )
    return assemble(subjects, records, environment, complete=complete)


def _print_pages(report: dict, statuses: tuple[str, ...]) -> None:
    """The page of each fault that violates a requirement with one of these statuses."""
    failing = [r for r in report["requirements"] if r["status"] in statuses and "failure" in r]
    pages = [r["failure"]["page"] for r in failing if not is_told_elsewhere(r)]
    for page in pages:
        print(f"\n{'-' * 100}\n{page}")
    if pages:
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
                write_case_data(witnesses / f"{failure['replay']}.json", r["id"], failure["case"], r["subject"])
                lines.append(f'witness = "{failure["replay"]}"')
            lines.append("")
    file.write_text("\n".join(lines))
    print(f"\nwrote {file}: fill in reason and link of each entry, and drop the tags that do not matter")
