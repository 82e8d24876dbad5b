"""conformance, comparing two reports: which requirements changed their status."""

import json
from pathlib import Path

from conformance.core.usage import UsageError


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
    path = file / "report.json" if file.is_dir() else file
    try:
        rows = json.loads(path.read_text())["requirements"]
        return {(row["subject"], row["id"]): row["status"] for row in rows}
    except OSError as error:
        raise UsageError(f"report {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"report {path} is none that `run --report` wrote") from None
