"""conformance, the report: one record for each requirement and subject; every view is made from these records."""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from conformance.core.judge import Entry, Judge, Violation
from conformance.core.kind import kind_of
from conformance.core.register import REQUIREMENTS, SPEC_VERSION, STAGES, stage_order
from conformance.run.deviations import case_id

STATUSES = ("ok", "known", "NEW", "STALE", "advice", "unsupported", "not judged")
FAILING = ("NEW", "STALE")
ALIKE = 3
"""So many requirements that are unsupported for one reason share a line of the table."""
SLOWEST = 5


def failure_page(judge: Judge, violation: Violation, diagnoses=()) -> str:
    """One violation as a page: the sentence, expected and received, the case, and how to run it again."""
    requirement, case = REQUIREMENTS[violation.requirement], violation.case
    token = "" if violation.token is None else f", token {violation.token}"
    rows: list[tuple[str, str]] = [("expected", violation.expected), ("received", violation.received), ("", "")]
    if case is not None:
        rows += kind_of(violation.requirement).rows_of_page(case, violation.token)
        rows += violation.rows
        rows.append(("tags", " ".join(sorted(case.tags))))
    for fault in diagnoses:
        rows.append(("looks like", f"{fault.name}: {fault.summary} {fault.link}".rstrip()))
    rows += [("went wrong in", ", ".join(requirement.links))] if requirement.links else []
    rows.append(("", ""))
    if case is not None:
        rows.append(("replay", f"moe-conformance replay {case_id(violation.requirement, case)} --subject {judge.name}"))
    width = max(len(name) for name, _ in rows)
    body = [f"    {name:<{width}}  {text}".rstrip() for name, text in rows]
    title = f"{requirement.id} {requirement.level}  {requirement.sentence}"
    return "\n".join([title, "", f"    {judge.name}: {violation.title}{token}", *body])


def record(judge: Judge, requirement: str, entry: Entry, page: str = "") -> dict:
    """What is known of one requirement and one subject, as plain data."""
    row, violation = REQUIREMENTS[requirement], entry.violation
    found = {
        "id": requirement,
        "subject": judge.name,
        "version": judge.subject.version,
        "level": row.level,
        "stage": row.stage,
        "sentence": row.sentence,
        "since": row.since,
        "status": entry.status(row.level),
        "cases": entry.judged,
        "near_ties": entry.near_ties,
        "layouts": sorted(entry.places),
        "known": [
            {"deviation": str(d), "reason": d.reason, "link": d.link, "kind": d.kind, "cases": n}
            for d, n in entry.known.items()
        ],
        "unsupported": [] if entry.judged else [why for why, _ in (entry.reasons + entry.not_run).most_common(5)],
    }
    if violation is not None:
        found["failure"] = {
            "title": violation.title,
            "expected": violation.expected,
            "received": violation.received,
            "token": violation.token,
            "tags": sorted(violation.case.tags) if violation.case is not None else [],
            "case": violation.case.to_json() if violation.case is not None else None,
            "replay": case_id(requirement, violation.case) if violation.case is not None else None,
            "page": page,
        }
    return found


def assemble(subjects: list[dict], records: list[dict], environment: dict, *, complete: bool) -> dict:
    """The whole report: `report.json`."""
    order = sorted(records, key=lambda r: (r["subject"], stage_order(r["id"])))
    return {
        "schema": 1,
        "spec": SPEC_VERSION,
        "environment": environment,
        "subjects": subjects,
        "requirements": order,
        "complete": complete,
    }


def counts(records: list[dict]) -> dict[str, int]:
    """How many requirements have each status."""
    return {status: sum(r["status"] == status for r in records) for status in STATUSES}


def summary(records: list[dict]) -> str:
    """One line of counts, without the zeros past the first three."""
    found = counts(records)
    shown = [f"{n} {status}" for status, n in found.items() if n or status in ("ok", "known", "NEW")]
    return ", ".join(shown)


def table(subject: dict, records: list[dict]) -> str:
    """The requirements of one subject, a line each; many that are unsupported for one reason share one."""
    lines = [f"subject {subject['name']} {subject['version']}".rstrip() + f"     spec {SPEC_VERSION}", ""]
    why = Counter(r["unsupported"][0] for r in records if r["status"] == "unsupported" and r["unsupported"])
    alike: dict[str, list[str]] = {}
    for r in sorted(records, key=lambda r: stage_order(r["id"])):
        if r["status"] == "unsupported" and r["unsupported"] and why[r["unsupported"][0]] >= ALIKE:
            alike.setdefault(r["unsupported"][0], []).append(r["id"])
            continue
        notes = []
        if r["near_ties"]:
            notes.append(f"{r['near_ties']} near ties forgiven")
        if r["status"] == "unsupported" and r["unsupported"]:
            notes.append(r["unsupported"][0])
        if r["known"]:
            notes.append(f"{sum(d['cases'] for d in r['known'])} cases")
        note = f"  [{'; '.join(notes)}]" if notes else ""
        lines.append(f"  {r['status']:<11} {r['id']:<6}  {r['sentence']}{note}")
        lines += [f"              declared {d['deviation']}: {d['reason']} {d['link']}" for d in r["known"]]
    for sentence, names in alike.items():
        through = f"{names[0]} .. {names[-1]}, {len(names)} requirements"
        lines.append(f"  {'unsupported':<11} {sentence}: {through}")
    layouts = {layout for r in records for layout in r.get("layouts", ())}
    on = f" on {len(layouts)} different layouts" if layouts else ""
    return "\n".join([*lines, "", f"  {summary(records)}{on}"])


def durations(records: list[dict]) -> str:
    """Seconds of each stage of one subject, and of its slowest requirements."""
    seconds = {stage: sum(r.get("seconds", 0) for r in records if r["stage"] == stage) for stage in STAGES}
    slowest = sorted(records, key=lambda r: -r.get("seconds", 0))[:SLOWEST]
    lines = [f"  {stage:<9} {spent:7.1f} s" for stage, spent in seconds.items() if spent]
    spent = [r for r in slowest if r.get("seconds")]
    lines += [f"  slowest   {r['id']:<7} {r['seconds']:6.1f} s  {r['cases']} cases" for r in spent]
    return "\n".join(lines)


def matrix(report: dict) -> str:
    """Stages by subjects: requirements that hold, of those judged; '-' where none could be judged."""
    names = [s["name"] for s in report["subjects"]]
    width = max([11, *(len(name) for name in names)])
    lines = ["stage    " + "".join(f"{name:>{width + 2}}" for name in names)]
    for stage in STAGES:
        cells = []
        for name in names:
            here = [r for r in report["requirements"] if r["subject"] == name and r["stage"] == stage]
            judged = [r for r in here if r["status"] not in ("unsupported", "not judged")]
            cell = f"{sum(r['status'] == 'ok' for r in judged)}/{len(judged)}" if judged else "-"
            new = sum(r["status"] in FAILING for r in judged)
            known = sum(r["status"] == "known" for r in judged)
            cell += f" {new} NEW" if new else f" {known} known" if known else ""
            cells.append(f"{cell:>{width + 2}}")
        lines.append(f"{stage:<9}" + "".join(cells))
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """The report as Markdown: a matrix of requirements by subjects, then every failure."""
    names = [s["name"] for s in report["subjects"]]
    status = {(r["subject"], r["id"]): r["status"] for r in report["requirements"]}
    lines = [f"# Conformance report, specification {report['spec']}", ""]
    if not report["complete"]:
        lines += ["**Not complete:** a run was cut short or narrowed; what is missing was not judged.", ""]
    lines += ["| id | level | requirement | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for r in REQUIREMENTS.values():
        cells = [status.get((name, r.id), "not judged") for name in names]
        lines.append(f"| {r.id} | {r.level} | {r.sentence} | " + " | ".join(cells) + " |")
    for r in report["requirements"]:
        if "failure" in r:
            lines += ["", f"## {r['subject']}: {r['id']} {r['status']}", "", "```text", r["failure"]["page"], "```"]
        for d in r["known"]:
            lines += ["", f"- {r['subject']} {d['deviation']} ({d['kind']}): {d['reason']} <{d['link']}>"]
    return "\n".join(lines) + "\n"


def junit(report: dict) -> str:
    """The report as JUnit XML: a suite for each subject, a test case for each requirement."""
    root = ET.Element("testsuites", name="moe-conformance")
    for subject in report["subjects"]:
        records = [r for r in report["requirements"] if r["subject"] == subject["name"]]
        found = counts(records)
        skipped = found["unsupported"] + found["not judged"]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=subject["name"],
            tests=str(len(records)),
            failures=str(found["NEW"] + found["STALE"]),
            skipped=str(skipped),
        )
        for r in records:
            case = ET.SubElement(
                suite, "testcase", classname=f"{subject['name']}.{r['stage']}", name=f"{r['id']} {r['sentence']}"
            )
            properties = ET.SubElement(case, "properties")
            for name in ("id", "level", "status"):
                ET.SubElement(properties, "property", name=name, value=r[name])
            if r["status"] in FAILING:
                page = r.get("failure", {}).get("page", r["status"])
                ET.SubElement(case, "failure", message=r.get("failure", {}).get("title", r["status"])).text = page
            elif r["status"] in ("unsupported", "not judged"):
                ET.SubElement(case, "skipped", message="; ".join(r["unsupported"]) or r["status"])
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def write(report: dict, folder: Path) -> None:
    """report.json, report.md and junit.xml in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report))
    (folder / "junit.xml").write_text(junit(report))
