"""conformance, the report: one record for each requirement and subject; every view is made from these records."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Sequence

from conformance.core.case import Case
from conformance.core.fault import Fault
from conformance.core.judge import Entry, Judge, Violation
from conformance.core.kind import kind_of
from conformance.core.picture import panels_of
from conformance.core.register import REQUIREMENTS, SPEC_VERSION, STAGES, stage_order
from conformance.core.shrink import still_violated
from conformance.run.causes import MOST_SHOWN
from conformance.run.deviations import case_id
from conformance.run.watch import Died

STATUSES = ("ok", "known", "NEW", "STALE", "advice", "unsupported", "not judged")
FAILING = ("NEW", "STALE")
ALIKE = 3
"""So many requirements that are unsupported for one reason share a line of the table."""
SLOWEST = 5
MOST_TOKENS = 2**16
"""Of a case that is drawn: the subject is called on it once more."""


def failure_page(judge: Judge, violation: Violation, causes: Sequence[Fault] = ()) -> str:
    """One violation as a page: the sentence, expected and received, the case, and how to run it again."""
    return _page(_failure(judge, violation, causes))


def _failure(judge: Judge, violation: Violation, causes: Sequence[Fault]) -> dict:
    """A violation as plain data: what its page is made of."""
    return _told(judge.name, violation, causes) | {"picture": _picture(judge, violation)}


def _told(subject: str, violation: Violation, causes: Sequence[Fault] = ()) -> dict:
    """The same without a picture, for which the subject is called."""
    case, kind = violation.case, kind_of(violation.requirement)
    return {
        "requirement": violation.requirement,
        "subject": subject,
        "title": violation.title,
        "expected": violation.expected,
        "received": violation.received,
        "token": violation.token,
        "tags": sorted(case.tags) if case is not None else [],
        "case": case.to_json() if case is not None else None,
        "replay": case_id(violation.requirement, case) if case is not None else None,
        "rows": [*kind.rows_of_page(case, violation.token), *violation.rows] if case is not None else [],
        "looks_like": {fault.name: f"{fault.name}: {fault.summary} {fault.link}".rstrip() for fault in causes},
        "first": None,
        "also_broken": {},
        "picture": [],
    }


def _picture(judge: Judge, violation: Violation) -> list[dict]:
    """The panels of a violation; a subject that hung or died on the case is not called on it again."""
    if violation.case is None or violation.case.num_tokens > MOST_TOKENS:
        return []
    asked = None if isinstance(violation, Died) else judge
    return panels_of(kind_of(violation.requirement).picture(asked, violation, violation.case))


def _witnessed(judge: Judge, requirement: str, witness: Case | None) -> dict:
    """The failure that a declared deviation is about, as its witness shows it; nothing without a witness."""
    undeclared = Judge(judge.subject)
    violation = None if witness is None else still_violated(undeclared, requirement, witness)
    if violation is None:
        return {}
    failure = _failure(undeclared, violation, ())
    return {"failure": failure | {"page": _page(failure)}}


def _page(failure: dict) -> str:
    """The page of a failure."""
    requirement = REQUIREMENTS[failure["requirement"]]
    rows: list[tuple[str, str]] = [("expected", failure["expected"]), ("received", failure["received"]), ("", "")]
    rows += [(name, text) for name, text in failure["rows"]]
    if failure["case"] is not None:
        rows.append(("tags", " ".join(failure["tags"])))
    rows += [("looks like", text) for text in list(failure["looks_like"].values())[:MOST_SHOWN]]
    rows += [("also broken", f"by {why}: {', '.join(names)}") for why, names in failure["also_broken"].items()]
    rows += [("went wrong in", ", ".join(requirement.links))] if requirement.links else []
    rows.append(("", ""))
    if failure["replay"] is not None:
        rows.append(("replay", f"moe-conformance replay {failure['replay']} --subject {failure['subject']}"))
    width = max(len(name) for name, _ in rows)
    body = [f"    {name:<{width}}  {text}".rstrip() for name, text in rows]
    token = "" if failure["token"] is None else f", token {failure['token']}"
    title = f"{requirement.id} {requirement.level}  {requirement.sentence}"
    return "\n".join([title, "", f"    {failure['subject']}: {failure['title']}{token}", *body])


SAME_CASE, SAME_FAULT = "the same case", "the same fault"


def folded(records: list[dict]) -> list[dict]:
    """The records of one subject whose pages of one fault are one page: the first has a line for the others.

    A record that is told on the page of another one keeps its own page, and says in `first` whose page tells of it.
    Those on one page look like what all of them look like.
    """
    found: list[dict] = [r | {"failure": dict(r["failure"])} if "failure" in r else r for r in records]
    by_id = {r["id"]: r["failure"] for r in found if "failure" in r}
    for r in sorted(found, key=lambda r: stage_order(r["id"])):
        own = by_id.get(r["id"])
        first = by_id.get(own["first"]["requirement"]) if own is not None and own["first"] is not None else None
        if own is None or first is None:
            if own is not None:
                own["first"] = None
            continue
        why = own["first"]["why"]
        first["also_broken"] = first["also_broken"] | {why: [*first["also_broken"].get(why, ()), r["id"]]}
        both = {name: text for name, text in first["looks_like"].items() if name in own["looks_like"]}
        first["looks_like"] = both or first["looks_like"]
        first["page"] = _page(first)
    return found


def is_told_elsewhere(r: dict) -> bool:
    """Whether the page of another requirement tells of this one."""
    return r.get("failure", {}).get("first") is not None


def record(
    judge: Judge, requirement: str, entry: Entry, causes: Sequence[Fault] = (), first: dict | None = None
) -> dict:
    """What is known of one requirement and one subject, as plain data.

    Args:
        causes: the known faults that explain its violation, the likeliest first.
        first: {"requirement", "why"} of the page that tells of this violation as well.
    """
    row, violation = REQUIREMENTS[requirement], entry.violation
    found = {
        "id": requirement,
        "subject": judge.name,
        "version": judge.subject.version,
        "where": judge.where,
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
            | _witnessed(judge, d.requirement, d.witness)
            for d, n in entry.known.items()
        ],
        "unsupported": [] if entry.judged else [why for why, _ in (entry.reasons + entry.not_run).most_common(5)],
    }
    if violation is not None:
        failure = _failure(judge, violation, causes)
        found["failure"] = failure | {"first": first, "page": _page(failure)}
    return found


def not_judged(subject: str, records: Collection[dict]) -> list[dict]:
    """A record for each requirement that a subject has none of, so that a partial run never looks whole."""
    judged = {r["id"] for r in records}
    return [
        {
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
        for r in REQUIREMENTS.values()
        if r.id not in judged
    ]


def cut_short(subject: str, requirement: str, title: str, received: str) -> dict:
    """A record of a requirement on which a process broke, where no other one came to say on which case."""
    (row,) = (r for r in not_judged(subject, []) if r["id"] == requirement)
    violation = Died(title, expected="a result", received=received, requirement=requirement)
    failure = _told(subject, violation)
    status = Entry(violation=violation).status(row["level"])
    return row | {"status": status, "layouts": [], "failure": failure | {"page": _page(failure)}}


def fact(records: Collection[dict], name: str) -> str:
    """What the records of one subject say of its version, or of where it computed."""
    return next((r[name] for r in records if r.get(name)), "")


def assemble(subjects: list[dict], records: list[dict], environment: dict, *, complete: bool) -> dict:
    """The whole report: `report.json`."""
    names = sorted({r["subject"] for r in records})
    whole = [r for name in names for r in folded([r for r in records if r["subject"] == name])]
    order = sorted(whole, key=lambda r: (r["subject"], stage_order(r["id"])))
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


def tally(records: list[dict]) -> tuple[int, int]:
    """Requirements that hold, and those that were judged."""
    judged = [r for r in records if r["status"] not in ("unsupported", "not judged")]
    return sum(r["status"] == "ok" for r in judged), len(judged)


def summary(records: list[dict]) -> str:
    """One line of counts, without the zeros past the first three."""
    found = counts(records)
    shown = [f"{n} {status}" for status, n in found.items() if n or status in ("ok", "known", "NEW")]
    return ", ".join(shown)


def table(subject: dict, records: list[dict]) -> str:
    """The requirements of one subject, a line each; many that are unsupported for one reason share one."""
    where = f" {subject['where']}" if subject.get("where") else ""
    lines = [f"subject {subject['name']} {subject['version']}".rstrip() + f"{where}     spec {SPEC_VERSION}", ""]
    why = Counter(r["unsupported"][0] for r in records if r["status"] == "unsupported" and r["unsupported"])
    alike: dict[str, list[str]] = {}
    reached = {r["stage"] for r in records if r["status"] != "not judged"}
    left_out: dict[str, list[str]] = {}
    for r in sorted(records, key=lambda r: stage_order(r["id"])):
        if r["status"] == "unsupported" and r["unsupported"] and why[r["unsupported"][0]] >= ALIKE:
            alike.setdefault(r["unsupported"][0], []).append(r["id"])
            continue
        if r["stage"] not in reached:
            left_out.setdefault(r["stage"], []).append(r["id"])
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
    for stage, names in left_out.items():
        lines.append(f"  {'not judged':<11} {names[0]} .. {names[-1]}, {len(names)} requirements of {stage}")
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
            holds, judged = tally(here)
            cell = f"{holds}/{judged}" if judged else "-"
            new = sum(r["status"] in FAILING for r in here)
            known = sum(r["status"] == "known" for r in here)
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
            lines += ["", f"## {r['subject']}: {r['id']} {r['status']}", ""]
            if is_told_elsewhere(r):
                lines.append(f"See {r['failure']['first']['requirement']}: {r['failure']['first']['why']}.")
            else:
                lines += ["```text", r["failure"]["page"], "```"]
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
            # The id alone: it stays when a sentence is put better, so that a history of runs stays in one piece.
            time = str(r.get("seconds", 0))
            case = ET.SubElement(
                suite, "testcase", classname=f"{subject['name']}.{r['stage']}", name=r["id"], time=time
            )
            properties = ET.SubElement(case, "properties")
            for name in ("level", "status", "sentence"):
                ET.SubElement(properties, "property", name=name, value=r[name])
            if r["status"] in FAILING:
                page = r.get("failure", {}).get("page", r["status"])
                ET.SubElement(case, "failure", message=r.get("failure", {}).get("title", r["status"])).text = page
            elif r["status"] in ("unsupported", "not judged"):
                ET.SubElement(case, "skipped", message="; ".join(r["unsupported"]) or r["status"])
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
