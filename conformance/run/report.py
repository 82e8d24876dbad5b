"""conformance, the report: one record for each requirement and subject; every view is made from these records."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from conformance.balance.case import LoadCase
from conformance.balance.page import load_rows, load_side_by_side
from conformance.core.judge import Entry, Judge, NotRun, Violation, stage_order
from conformance.core.register import REQUIREMENTS, SPEC_VERSION, STAGES
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import output
from conformance.router.case import Case
from conformance.run.deviations import case_id
from conformance.sharded.case import LayoutCase
from conformance.sharded.page import layout_rows, ranks_side_by_side

STATUSES = ("ok", "known", "NEW", "STALE", "advice", "unsupported", "not judged")
FAILING = ("NEW", "STALE")


def failure_page(judge: Judge, violation: Violation, diagnoses=()) -> str:
    """One violation as a page: the sentence, expected and received, the case, and how to run it again."""
    requirement, case = REQUIREMENTS[violation.requirement], violation.case
    token = "" if violation.token is None else f", token {violation.token}"
    rows: list[tuple[str, str]] = [("expected", violation.expected), ("received", violation.received), ("", "")]
    if case is not None:
        if isinstance(case, LoadCase):
            rows += load_rows(case, violation.token)
        else:
            rows += _layer_rows(case, violation.token) if isinstance(case, LayerCase) else _rows(case, violation.token)
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


def _rows(case: Case, token: int | None) -> list[tuple[str, str]]:
    """What a page shows of a router's case."""
    rows = [("spec", f"{_fields(case.spec)} tokens={case.num_tokens} dtype={case.dtype}")]
    t = token if token is not None else 0
    if case.num_tokens:
        rows.append((f"logits[{t}]", _numbers(case.logits_TE[t])))
        trace = case.reference if "nan_logits" not in case.tags else None
        if trace is not None and trace.scores_TE is not None:
            rows.append((f"scores[{t}]", _numbers(trace.scores_TE[t])))
    if case.expert_bias_E is not None:
        rows.append(("bias", _numbers(case.expert_bias_E)))
    return rows + [(name, _numbers(value)) for name, value in case.inputs.items()]


def _layer_rows(case: LayerCase, token: int | None) -> list[tuple[str, str]]:
    """What a page shows of a layer's case: the specs, and the token with its experts; the file has the parameters."""
    spec, trace = case.spec, case.reference
    shared = "none" if spec.shared is None else _fields(spec.shared)
    rows = [
        ("router", f"{_fields(spec.router)}{' gate_bias=True' if spec.gate_bias else ''} tokens={case.num_tokens}"),
        ("experts", _fields(spec.experts)),
        ("shared", shared),
        ("rows", f"{_numbers(trace.permutation.tokens_per_expert_E)} of each expert"),
    ]
    rows += layout_rows(case, token)
    t = token if token is not None else 0
    if case.num_tokens:
        rows += [
            (f"token[{t}]", _numbers(case.x_TD[t])),
            (f"ids[{t}]", _numbers(trace.routing.expert_ids_TK[t])),
            (f"weights[{t}]", _numbers(trace.routing.weights_TK[t])),
        ]
    if case.params.expert_bias_E is not None:
        rows.append(("bias", _numbers(case.params.expert_bias_E)))
    return rows + [(name, _numbers(value)) for name, value in case.inputs.items()]


def _fields(spec) -> str:
    return " ".join(f"{name}={value}" for name, value in spec.to_dict().items())


def _numbers(values) -> str:
    flat = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(flat, list):
        return str(flat)
    if flat and isinstance(flat[0], list):
        return " ".join(_numbers_row(row) for row in flat)
    return _numbers_row(flat)


def _numbers_row(row: list) -> str:
    return "[" + " ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) + "]"


def side_by_side(judge: Judge, case: Case | LayerCase | LoadCase, most_tokens: int = 4) -> str:
    """Every stage of the reference for each token, and what the subject returned beside it."""
    if isinstance(case, LoadCase):
        return load_side_by_side(case)
    if isinstance(case, LayoutCase):
        return ranks_side_by_side(judge, case, most_tokens)
    if isinstance(case, LayerCase):
        return _layers_side_by_side(judge, case, most_tokens)
    lines, trace = [], case.reference
    try:
        seen = judge.observe(case)
    except (NotRun, Violation) as error:
        seen = None
        lines.append(f"    {judge.name} returned nothing that can be shown: {error}")
    for t in range(min(case.num_tokens, most_tokens)):
        lines.append(f"    token {t}")
        for name in (
            "logits_TE",
            "scores_TE",
            "scores_for_choice_TE",
            "group_scores_TG",
            "group_ids_TL",
            "expert_ids_TK",
            "weights_TK",
            "shared_weights_TS",
        ):
            wanted, found = getattr(trace, name, None), getattr(seen, name, None)
            if wanted is not None:
                lines.append(f"      {name:<21} reference {_numbers(wanted[t])}")
                if found is not None:
                    lines.append(f"      {'':<21} {judge.name:<9} {_numbers(found[t])}")
    if case.num_tokens > most_tokens:
        lines.append(f"    and {case.num_tokens - most_tokens} more tokens")
    return "\n".join(lines)


def _layers_side_by_side(judge: Judge, case: LayerCase, most_tokens: int) -> str:
    """Each token's way through the reference, and the subject's output beside it where it has whole layers."""
    lines, trace = [], case.reference
    try:
        found_TD = output(judge, case, "LAY-1")
    except (NotRun, Violation) as error:
        found_TD = None
        lines.append(f"    {judge.name} returned no output of the layer: {error}")
    for t in range(min(case.num_tokens, most_tokens)):
        lines.append(f"    token {t}")
        for name, values in (
            ("x_TD", trace.x_TD),
            ("expert_ids_TK", trace.routing.expert_ids_TK),
            ("weights_TK", trace.routing.weights_TK),
            ("slot_outputs_TKD", trace.slot_outputs_TKD),
            ("shared_TD", trace.shared_TD),
            ("output_TD", trace.output_TD),
        ):
            lines.append(f"      {name:<21} reference {_numbers(values[t])}")
        if found_TD is not None:
            lines.append(f"      {'':<21} {judge.name:<9} {_numbers(found_TD[t])}")
    if case.num_tokens > most_tokens:
        lines.append(f"    and {case.num_tokens - most_tokens} more tokens")
    return "\n".join(lines)


def record(judge: Judge, id: str, entry: Entry, page: str = "") -> dict:
    """What is known of one requirement and one subject, as plain data."""
    requirement, violation = REQUIREMENTS[id], entry.violation
    found = {
        "id": id,
        "subject": judge.name,
        "version": judge.subject.version,
        "level": requirement.level,
        "stage": requirement.stage,
        "sentence": requirement.sentence,
        "since": requirement.since,
        "status": entry.status(requirement.level),
        "cases": entry.judged,
        "near_ties": entry.near_ties,
        "layouts": sorted(entry.layouts),
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
            "replay": case_id(id, violation.case) if violation.case is not None else None,
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
    """The requirements of one subject, a line each."""
    lines = [f"subject {subject['name']} {subject['version']}".rstrip() + f"     spec {SPEC_VERSION}", ""]
    for r in sorted(records, key=lambda r: stage_order(r["id"])):
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
    layouts = {layout for r in records for layout in r.get("layouts", ())}
    on = f" on {len(layouts)} different layouts" if layouts else ""
    return "\n".join([*lines, "", f"  {summary(records)}{on}"])


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
    for id, r in REQUIREMENTS.items():
        cells = [status.get((name, id), "not judged") for name in names]
        lines.append(f"| {id} | {r.level} | {r.sentence} | " + " | ".join(cells) + " |")
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
