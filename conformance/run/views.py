"""conformance, running: the views of a report that a command line asks for, and the summary of a GitHub job."""

import json
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from conformance.core.register import REQUIREMENTS, SPEC_VERSION
from conformance.core.usage import UsageError
from conformance.run.badge import badge
from conformance.run.html_page import first_failure, html
from conformance.run.report import FAILING, is_told_elsewhere, junit, markdown, matrix, summary

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file in which a step of a GitHub job leaves Markdown."""
MOST_PAGES = 20
"""Of a summary; a job may leave 1 MiB."""

VIEWS = {"html": html, "junit": junit, "badge": badge}
"""option -> what makes the text of its file."""


def add_options(command: ArgumentParser) -> None:
    """The options that name files for views."""
    command.add_argument("--html", type=Path, metavar="FILE", help="write the report as one HTML file with pictures")
    command.add_argument(
        "--summary", type=Path, metavar="FILE", help="append a short Markdown summary (default: $GITHUB_STEP_SUMMARY)"
    )
    command.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML: a test case for each requirement")
    command.add_argument("--badge", type=Path, metavar="FILE", help='write an SVG such as "moe-conformance 224/224"')


def write_views(report: dict[str, Any], options: Namespace) -> list[Path]:
    """Write what the options ask for; the summary also where a GitHub job asks for it. Returns the files.

    Raises:
        UsageError: a file cannot be written.
    """
    written = []
    for name, make in VIEWS.items():
        if (file := getattr(options, name)) is not None:
            _write(file, make(report), f"--{name}")
            written.append(file)
    if (file := options.summary or step_summary()) is not None:
        write_summary(report, file)
        written += [file] if options.summary else []
    return written


def write_summary(report: dict[str, Any], file: Path) -> None:
    """Append the report in short; the steps of a job share a file."""
    _write(file, short_markdown(report), "--summary", append=True)


def step_summary() -> Path | None:
    """The file for Markdown of this step of a GitHub job; None elsewhere."""
    return Path(os.environ[STEP_SUMMARY]) if os.environ.get(STEP_SUMMARY) else None


def _write(file: Path, text: str, option: str, *, append: bool = False) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a" if append else "w", encoding="utf-8") as to:
            to.write(text)
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror}") from None


def short_markdown(report: dict[str, Any]) -> str:
    """The report in short: a line for each subject, the stages, and each failure behind its title."""
    lines = [f"## moe-conformance, specification {report['spec']}", ""]
    if not report["complete"]:
        lines += ["**Not complete:** a run was cut short or narrowed; what is missing was not judged.", ""]
    for subject in report["subjects"]:
        records = [r for r in report["requirements"] if r["subject"] == subject["name"]]
        first = first_failure(records)
        mark = "✅" if first is None else "❌"
        where = "" if first is None else f"; the first failure is in stage **{first['stage']}**, {first['id']}"
        lines.append(f"- {mark} **{subject['name']}** {subject['version']}: {summary(records)}{where}")
    lines += ["", "<details><summary>Stages</summary>", "", "```text", matrix(report), "```", "", "</details>", ""]
    pages = [
        r for r in report["requirements"] if r["status"] in FAILING and "failure" in r and not is_told_elsewhere(r)
    ]
    for r in pages[:MOST_PAGES]:
        title = _text(f"{r['subject']}: {r['id']} {r['failure']['title']}")
        lines += [
            f"<details><summary>{title}</summary>",
            "",
            "```text",
            r["failure"]["page"],
            "```",
            "",
            "</details>",
            "",
        ]
    if len(pages) > MOST_PAGES:
        lines += [f"and {len(pages) - MOST_PAGES} more failures.", ""]
    known = [(r, d) for r in report["requirements"] for d in r["known"]]
    if known:
        lines += ["<details><summary>Known differences</summary>", ""]
        lines += [f"- {r['subject']} {r['id']} ({d['kind']}): {d['reason']} <{d['link']}>" for r, d in known]
        lines += ["", "</details>", ""]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """A text between tags of HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# a folder, and back


def write_folder(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md, report.html and junit.xml in a folder."""
    texts = {"json": json.dumps(report, indent=1) + "\n", "md": markdown(report), "html": html(report)}
    for ending, text in texts.items():
        _write(folder / f"report.{ending}", text, "--report")
    _write(folder / "junit.xml", junit(report), "--report")


def read_report(file: Path) -> dict[str, Any]:
    """A report.json, or that of the folder that holds it.

    Raises:
        UsageError: it is none.
    """
    path = file / "report.json" if file.is_dir() else file
    try:
        found = json.loads(path.read_text())
        rows = [(row["subject"], row["id"], row["status"]) for row in found["requirements"]]
    except OSError as error:
        raise UsageError(f"report {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"report {path} is none that `run --report` wrote") from None
    if unknown := sorted({name for _, name, _ in rows} - REQUIREMENTS.keys()):
        raise UsageError(f"report {path} is of specification {found.get('spec')}; {SPEC_VERSION} has no {unknown[0]}")
    return found


def views(options: Namespace) -> int:
    """`moe-conformance report`: views of a stored report; 1 where something in it fails."""
    report = read_report(options.file)
    for file in write_views(report, options):
        print(f"wrote {file}")
    print(matrix(report))
    return 1 if any(r["status"] in FAILING for r in report["requirements"]) else 0
