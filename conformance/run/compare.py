"""conformance, comparing two reports: which requirements changed their status."""

from pathlib import Path

from conformance.run.views import read_report


def compare(options) -> int:
    """Print what differs between two report.json: 0 where nothing does, 1 where something does."""
    before, after = statuses(options.before), statuses(options.after)
    differing = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    for subject, requirement in differing:
        old, new = (found.get((subject, requirement), "absent") for found in (before, after))
        print(f"{subject:<24} {requirement:<7} {old:<12} -> {new}")
    print(f"{len(before)} verdicts before, {len(after)} after, {len(differing)} differ")
    return 1 if differing else 0


def statuses(file: Path) -> dict[tuple[str, str], str]:
    """(subject, requirement) -> status, of a report.json or of the folder that holds it.

    Raises:
        UsageError: it is none.
    """
    return {(row["subject"], row["id"]): row["status"] for row in read_report(file)["requirements"]}
