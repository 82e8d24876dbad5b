"""conformance, running: the report as one HTML file that opens from disk. No script, no font, no request.

Everything comes from `report.json`; the panels of a failure are drawn by `pictures/panels.py`.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from conformance.core.register import REQUIREMENTS, STAGES, stage_order, url
from conformance.pictures.panels import panels_html
from conformance.run.causes import MOST_SHOWN
from conformance.run.report import FAILING, counts, is_told_elsewhere, summary, tally

MARKS = {"ok": "✓", "known": "●", "NEW": "✕", "STALE": "✕", "advice": "○", "unsupported": "–", "not judged": "·"}
MEANINGS = {
    "ok": "holds",
    "known": "a declared difference",
    "NEW": "a MUST fails",
    "STALE": "a declaration that is gone or out of date",
    "advice": "a SHOULD does not hold",
    "unsupported": "the subject does not do it",
    "not judged": "this run left it out",
}
CSS = Path(__file__).parents[1] / "templates" / "report.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Even a page with a mistake loads nothing."""

Record = dict[str, Any]


def html(report: dict[str, Any]) -> str:
    """The whole page."""
    records, names = report["requirements"], [subject["name"] for subject in report["subjects"]]
    failing = [r for r in records if "failure" in r]
    body = [
        _head(report),
        '<main id="main">',
        _cards(report),
        _strips(report),
        _failures(failing, several=len(names) > 1),
        _known([r for r in records if r["known"]]),
        _matrix(records, names),
        "</main>",
        f"<footer>Specification {escape(report['spec'])}. Nothing on this page is loaded from elsewhere.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(report))}</title><style>\n{CSS.read_text()}</style></head>\n<body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )


def _title(report: dict[str, Any]) -> str:
    new = sum(counts(report["requirements"])[status] for status in FAILING)
    names = ", ".join(subject["name"] for subject in report["subjects"])
    return f"{f'{new} failures' if new else 'no new failure'}: {names}"


def _anchor(r: Record, what: str = "f") -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", f"{what}-{r['subject']}-{r['id']}")


def _status(status: str) -> str:
    kind = status.split()[0]
    return f'<span class="status s-{kind}" title="{MEANINGS[status]}">{MARKS[status]} {status}</span>'


def _head(report: dict[str, Any]) -> str:
    environment = {name: value for name, value in report["environment"].items() if value not in (None, "")}
    facts = " · ".join(f"{escape(name)} {escape(_plain(value))}" for name, value in environment.items())
    partial = (
        ""
        if report["complete"]
        else '<p class="partial"><strong>Not complete:</strong> a run was cut short or narrowed; what is missing was '
        "not judged.</p>"
    )
    has = {
        "failures": any(r["status"] in FAILING and "failure" in r for r in report["requirements"]),
        "advice": any(r["status"] == "advice" for r in report["requirements"]),
        "known": any(r["known"] for r in report["requirements"]),
    }
    links = [
        ("stages", "Stages"),
        ("failures", "Failures"),
        ("advice", "Advice"),
        ("known", "Known differences"),
        ("matrix", "All requirements"),
    ]
    nav = "".join(f'<a href="#{at}">{text}</a>' for at, text in links if has.get(at, True))
    return (
        '<a class="skip" href="#main">To the results</a><header>'
        f"<h1>Conformance report</h1><p class='quiet'>specification {escape(report['spec'])}"
        f"{' · ' if facts else ''}{facts}</p>{partial}<nav aria-label='Sections'>{nav}</nav></header>"
    )


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _of(report: dict[str, Any], name: str) -> list[Record]:
    return [r for r in report["requirements"] if r["subject"] == name]


def first_failure(records: list[Record]) -> Record | None:
    """The failing requirement of one subject that comes first, of those with a page of their own.

    What is told on the page of another one need not be of the stage that is at fault.
    """
    failing = [r for r in records if r["status"] in FAILING]
    own = [r for r in failing if not is_told_elsewhere(r)]
    return min(own or failing, key=lambda r: stage_order(r["id"]), default=None)


def _cards(report: dict[str, Any]) -> str:
    cards = []
    for subject in report["subjects"]:
        records = _of(report, subject["name"])
        first = first_failure(records)
        holds, judged = tally(records)
        where = f" {subject['where']}" if subject.get("where") else ""
        verdict = "No new failure."
        if first is not None:
            at = f'<a href="#{_anchor(first)}">{first["id"]}</a>'
            verdict = f"First failure in stage <strong>{escape(first['stage'])}</strong>: {at}"
        cards.append(
            f'<li class="card {"good" if first is None else "bad"}"><strong>{escape(subject["name"])}</strong> '
            f'<span class="quiet">{escape(subject["version"] + where)}</span>'
            f'<div class="big">{holds}/{judged}</div><p>{escape(summary(records))}</p><p>{verdict}</p></li>'
        )
    return f'<h2 class="hidden">Subjects</h2><ul class="cards">{"".join(cards)}</ul>'


def _strips(report: dict[str, Any]) -> str:
    parts = ['<section id="stages"><h2>Stages, in the order of the data</h2>']
    for subject in report["subjects"]:
        records = _of(report, subject["name"])
        first = first_failure(records)
        cells = []
        for stage in STAGES:
            here = [r for r in records if r["stage"] == stage]
            holds, judged = tally(here)
            found = counts(here)
            new = sum(found[status] for status in FAILING)
            kind = "bad" if new else "known" if found["known"] else "ok" if judged else "none"
            words = [f"{holds}/{judged}" if judged else "–"]
            words += [f"✕ {new} new"] if new else []
            words += [f"● {found['known']} known"] if found["known"] and not new else []
            at_first = first is not None and first["stage"] == stage
            words += ["first failure"] if at_first else []
            lines = "".join(f"<span>{word}</span>" for word in words)
            cells.append(f'<li class="{kind}{" first" if at_first else ""}"><b>{escape(stage)}</b>{lines}</li>')
        title = f"<h3>{escape(subject['name'])}</h3>" if len(report["subjects"]) > 1 else ""
        parts.append(f'{title}<ol class="strip" aria-label="Stages of {escape(subject["name"])}">{"".join(cells)}</ol>')
    return "".join([*parts, "</section>"])


# failures


def _failures(failing: list[Record], *, several: bool) -> str:
    """The failures of a MUST, then the SHOULDs that do not hold; the first failure of each subject is open."""
    order = sorted(failing, key=lambda r: (r["subject"], stage_order(r["id"])))
    musts, shoulds = ([r for r in order if (r["status"] in FAILING) == must] for must in (True, False))
    opened: set[str] = set()
    parts = []
    for at, title, note, records in (
        ("failures", "Failures", "One fault has one page; the first one of each subject is open.", musts),
        ("advice", "Advice", "SHOULDs that do not hold; no run fails by them.", shoulds),
    ):
        pages = []
        for r in records:
            is_open = at == "failures" and r["subject"] not in opened and not is_told_elsewhere(r)
            opened |= {r["subject"]} if is_open else set()
            pages.append(_failure(r, is_open=is_open, several=several))
        if pages:
            parts.append(f'<section id="{at}"><h2>{title}</h2><p class="quiet">{note}</p>{"".join(pages)}</section>')
    return "\n".join(parts)


def _failure(r: Record, *, is_open: bool, several: bool) -> str:
    failure = r["failure"]
    token = "" if failure["token"] is None else f", token {failure['token']}"
    who = f"{r['subject']}: " if several else ""
    title = escape(who + failure["title"] + token)
    told = f'<span class="quiet">told by {failure["first"]["requirement"]}</span>' if is_told_elsewhere(r) else ""
    head = (
        f'<summary><span class="id">{r["id"]}</span>{_status(r["status"])}'
        f'<span class="quiet">{escape(r["stage"])}</span><span class="title">{title}</span>{told}</summary>'
    )
    opened = " open" if is_open else ""
    return f'<details class="failure" id="{_anchor(r)}"{opened}>{head}<div>{_page(r)}</div></details>'


def _page(r: Record) -> str:
    failure = r["failure"]
    parts = [f"<p><strong>{r['id']} {r['level']}</strong> {escape(r['sentence'])}</p>"]
    if is_told_elsewhere(r):
        first = failure["first"]
        other = _anchor(r | {"id": first["requirement"]})
        parts.append(
            f'<p>Told on the page of <a href="#{other}">{first["requirement"]}</a>: {escape(first["why"])}.</p>'
        )
    parts.append(
        f"<dl class='pair'><div><dt>expected</dt><dd>{escape(failure['expected'])}</dd></div>"
        f"<div class='received'><dt>received</dt><dd>{escape(failure['received'])}</dd></div></dl>"
    )
    causes = list(failure["looks_like"].values())[:MOST_SHOWN]
    if causes:
        parts.append(f"<h3>Looks like</h3><ul>{''.join(f'<li>{_linked(text)}</li>' for text in causes)}</ul>")
    parts += [
        f"<p>Also broken by {escape(why)}: {escape(', '.join(ids))}</p>" for why, ids in failure["also_broken"].items()
    ]
    if failure.get("picture"):
        parts.append(f'<div class="panels">{panels_html(failure["picture"], r["subject"])}</div>')
    rows = [*failure["rows"], *([("tags", " ".join(failure["tags"]))] if failure["tags"] else [])]
    if rows:
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
        parts.append(f"<h3>The case</h3><dl class='rows'>{pairs}</dl>")
    if REQUIREMENTS[r["id"]].links:
        links = ", ".join(f'<a href="{escape(url(link))}">{escape(link)}</a>' for link in REQUIREMENTS[r["id"]].links)
        parts.append(f"<p>Went wrong in {links}</p>")
    if failure["replay"] is not None:
        command = f"moe-conformance replay {failure['replay']} --subject {r['subject']}"
        parts.append(f'<h3>Run it again</h3><pre tabindex="0">{escape(command)}</pre>')
    text = f'<pre tabindex="0">{escape(failure["page"])}</pre>'
    parts.append(f'<details><summary class="quiet">The page as text</summary>{text}</details>')
    return "".join(parts)


def _linked(text: str) -> str:
    """A text whose references to issues are links."""
    return re.sub(r"[\w.-]+/[\w.-]+#\d+", lambda found: f'<a href="{url(found[0])}">{found[0]}</a>', escape(text))


def _known(known: list[Record]) -> str:
    """Each declared difference with its reason, and the page of its witness."""
    parts = []
    for r in known:
        for number, d in enumerate(r["known"]):
            anchor = _anchor(r, "k") if number == 0 else f"{_anchor(r, 'k')}-{number}"
            who = f"{escape(r['subject'])}: {escape(d['reason'])}"
            head = (
                f'<summary><span class="id">{r["id"]}</span>{_status("known")}<span class="quiet">{escape(d["kind"])}'
                f'</span><span class="title">{who}</span></summary>'
            )
            link = f'<p><a href="{escape(d["link"])}">{escape(d["link"])}</a></p>'
            cases = f'<p class="quiet">Declared as {escape(d["deviation"])}; {d["cases"]} cases of this run.</p>'
            page = _page(r | {"failure": d["failure"]}) if "failure" in d else ""
            parts.append(f'<details class="failure" id="{anchor}">{head}<div>{link}{cases}{page}</div></details>')
    if not parts:
        return ""
    note = "Declared with a reason; no run fails by them, and one that is gone makes a run fail."
    return f'<section id="known"><h2>Known differences</h2><p class="quiet">{note}</p>{"".join(parts)}</section>'


def _row(cell: str, texts: Sequence[str]) -> str:
    scope = ' scope="col"' if cell == "th" else ""
    return "".join(f"<{cell}{scope}>{text}</{cell}>" for text in texts)


def _scrolling(label: str, content: str) -> str:
    """What may be wider than the page, in a box that the keyboard reaches and moves."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{content}</div>'


# the matrix

FILTERS = (
    ("all", "all"),
    ("judged", "judged"),
    ("known", "declared"),
    ("failing", "what does not hold"),
)


def _matrix(records: list[Record], names: list[str]) -> str:
    by_place = {(r["id"], r["subject"]): r for r in records}
    head = _row("th", ("id", "level", "requirement", *map(escape, names)))
    bodies = []
    for stage in STAGES:
        rows = []
        for requirement in (r for r in REQUIREMENTS.values() if r.stage == stage):
            found = [by_place.get((requirement.id, name)) for name in names]
            statuses = {r["status"] for r in found if r is not None}
            has = "has-bad " if statuses & {*FAILING, "advice"} else ""
            has += "has-known " if "known" in statuses else ""
            has += "has-judged " if statuses - {"unsupported", "not judged"} else ""
            cells = "".join(f"<td>{_cell(r)}</td>" for r in found)
            rows.append(
                f'<tr class="row {has.strip()}"><th scope="row">{requirement.id}</th><td>{requirement.level}</td>'
                f"<td>{escape(requirement.sentence)}</td>{cells}</tr>"
            )
        title = f'<tr class="stage"><th scope="rowgroup" colspan="{3 + len(names)}">{escape(stage)}</th></tr>'
        bodies.append(f"<tbody>{title}{''.join(rows)}</tbody>")
    boxes = "".join(
        f'<label><input type="radio" name="filter" id="f-{key}"{" checked" if key == "all" else ""}> {text}</label>'
        for key, text in FILTERS
    )
    keys = " ".join(f"{MARKS[status]} {meaning}," for status, meaning in MEANINGS.items() if status != "STALE")
    table = f'<table class="matrix"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>'
    return (
        f'<section id="matrix"><h2>All requirements</h2><fieldset><legend>Show</legend>{boxes}</fieldset>'
        f'<p class="quiet">{escape(keys.rstrip(","))}</p>'
        f"{_scrolling('All requirements', table)}</section>"
    )


def _cell(r: Record | None) -> str:
    if r is None:
        return _status("not judged")
    text = _status(r["status"])
    if "failure" in r:
        return f'<a href="#{_anchor(r)}">{text}</a>'
    if r["known"]:
        return f'<a href="#{_anchor(r, "k")}">{text}</a>'
    if r["status"] == "unsupported" and r["unsupported"]:
        return f'{text}<br><span class="quiet">{escape(r["unsupported"][0])}</span>'
    ties = f'<br><span class="quiet">{r["near_ties"]} near ties forgiven</span>' if r["near_ties"] else ""
    return text + ties
