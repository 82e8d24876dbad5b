"""conformance, known deviations: differences from the specification that somebody declared, with a reason and a link.

A TOML file of [[deviation]] tables. A declared failure does not fail a run, an undeclared one does, and so does a
declared one that is gone: its witness, a pinned case, is replayed first, so that this never depends on luck.
"""

import datetime
import json
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from conformance.core.case import Case
from conformance.core.check import CHECKS
from conformance.core.register import REQUIREMENTS
from conformance.core.usage import UsageError
from conformance.run.kinds import case_of_json, every_tag
from moe_ref.specs.checks import nearest, one_of, require

ROW = re.compile(r"\[[^][{}\"]*\]")
"""A list of numbers in JSON."""

REASONS = ("bug", "by-design", "numerics")


@dataclass(frozen=True, kw_only=True, eq=False)  # one entry of one file: equal to itself alone
class Deviation:
    """One declared difference from one requirement."""

    requirement: str
    when: frozenset[str]
    """Case tags, all of which a covered case has."""
    kind: str
    reason: str
    link: str
    witness: Case | None
    """A case that shows it; None for a requirement that is judged without a case (a configuration)."""
    witness_id: str = ""
    until: datetime.date | None = None

    def covers(self, violation) -> bool:
        """Whether a violation is this declared one."""
        if violation.requirement != self.requirement:
            return False
        tags = frozenset() if violation.case is None else violation.case.tags
        return self.when <= tags

    @property
    def expired(self) -> bool:
        return self.until is not None and datetime.date.today() > self.until

    def __str__(self) -> str:
        when = f" when {' & '.join(sorted(self.when))}" if self.when else ""
        return f"{self.requirement}{when}"


def read(path: Path) -> list[Deviation]:
    """The deviations of a TOML file.

    Raises:
        UsageError: an unknown key, requirement or tag (with the nearest one), or a missing reason, link or witness.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"deviations file {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"deviations file {path}: {error}") from None
    unknown = data.keys() - {"deviation"}
    if unknown:
        raise UsageError(f"deviations file {path}: unknown table {sorted(unknown)[0]!r} (did you mean deviation?)")
    found = []
    for number, entry in enumerate(data.get("deviation", []), 1):
        try:
            found.append(_entry(entry, path.parent))
        except ValueError as error:
            raise UsageError(f"deviations file {path}, entry {number}: {error}") from None
    return found


def _entry(entry: dict, folder: Path) -> Deviation:
    keys = {f.name for f in fields(Deviation)} - {"witness_id"}
    for key in entry:
        require(key in keys, f"unknown key {key!r}{nearest(key, keys)}")
    name, tags = entry.get("requirement", ""), every_tag()
    require(name in REQUIREMENTS, f"unknown requirement {name!r}{nearest(name, REQUIREMENTS)}")
    when = entry.get("when", [])
    require(isinstance(when, list), f"when is {when!r}; it is a list of tags")
    for tag in when:
        require(tag in tags, f"unknown tag {tag!r}{nearest(tag, tags)}")
    for key in ("reason", "link"):
        require(bool(str(entry.get(key, "")).strip()), f"{name} has no {key}")
    one_of("kind", entry.get("kind", "bug"), REASONS)
    until = entry.get("until")
    require(until is None or isinstance(until, datetime.date), f"until is {until!r}; it is a date such as 2027-01-31")
    needs_witness = CHECKS[name].shows_case
    require(not needs_witness or "witness" in entry, f"{name} has no witness; `replay` names the case of a failure")
    witness = read_case(folder / "witnesses" / f"{entry['witness']}.json")[1] if needs_witness else None
    return Deviation(
        requirement=name,
        when=frozenset(when),
        kind=entry.get("kind", "bug"),
        reason=entry["reason"],
        link=entry["link"],
        witness=witness,
        witness_id=entry.get("witness", ""),
        until=until,
    )


def read_case(path: Path) -> tuple[str, Case]:
    """The requirement and the case of a file that `write_case` wrote."""
    try:
        data = json.loads(path.read_text())
        require(isinstance(data, dict) and {"requirement", "case"} <= data.keys(), "it has no requirement and case")
        require(data["requirement"] in REQUIREMENTS, f"unknown requirement {data['requirement']!r}")
        return data["requirement"], case_of_json(data["case"])
    except OSError as error:
        raise UsageError(f"case {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"case {path}: {error}") from None


def case_id(requirement: str, case: Case) -> str:
    """The name under which a failing case replays, such as SEL-3-b254db."""
    return f"{requirement}-{case.digest}"


def write_case(folder: Path, requirement: str, case: Case, subject: str) -> Path:
    """Store a case so that it replays."""
    return write_case_data(folder / f"{case_id(requirement, case)}.json", requirement, case.to_json(), subject)


def write_case_data(path: Path, requirement: str, case: dict, subject: str) -> Path:
    """Store the JSON of a case so that it replays; a row of an array is a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"requirement": requirement, "subject": subject, "case": case}, indent=1)
    path.write_text(ROW.sub(lambda row: re.sub(r"\s+", " ", row[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n")
    return path
