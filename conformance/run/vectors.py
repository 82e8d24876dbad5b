"""conformance, running: `moe-conformance vectors`. Writes stored calls, and judges answers from elsewhere.

moe-conformance vectors write vectors/
moe-conformance vectors check vectors/ --answers answers/
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from conformance.core.register import REQUIREMENTS, SPEC_VERSION
from conformance.core.usage import UsageError
from conformance.run.kinds import load_faults
from conformance.vectors.choose import chosen
from conformance.vectors.files import INDEX, Read, digest, read, version_of, write
from conformance.vectors.judged import Verdict, damages, inconsistencies, other_bytes, verdict

SHOWN = 20
"""Differences, and damages, that are printed."""


def add_options(command: ArgumentParser) -> None:
    """The options of `vectors`."""
    command.add_argument("action", choices=("write", "check"), metavar="ACTION", help="write or check")
    command.add_argument("folder", type=Path, metavar="DIR", help="of the set")
    command.add_argument(
        "--answers", type=Path, metavar="DIR", help="check: what an implementation returned, CASE.safetensors each"
    )
    command.add_argument("--again", action="store_true", help="check: compute every case again on this machine")


def vectors(options: Namespace) -> int:
    """Write or check a set: 0 where all is well, 1 where files are damaged or answers are wrong."""
    if options.action == "write":
        if options.answers or options.again:
            raise UsageError("--answers and --again go with `vectors check`")
        return _write(options.folder)
    cases = read(options.folder)
    wrong = list(damages(options.folder, cases)) or [each for case in cases for each in inconsistencies(case)]
    _print(wrong)
    if wrong:
        print(f"{len(wrong)} files are not as written")
        return 1
    print(f"{len(cases)} cases as written, digest {digest(options.folder)}")
    answers: Path | None = options.answers
    if answers is None and not options.again:
        return 0
    if version_of(options.folder) != SPEC_VERSION:
        raise UsageError(
            f"{options.folder} is of {version_of(options.folder)}, and this is {SPEC_VERSION}: write it again"
        )
    if options.again:
        wrong = list(other_bytes(cases))
        _print(wrong)
        print(f"{len(cases) - len(wrong)} of {len(cases)} cases are the same bytes on this machine")
        if wrong:
            return 1
    if answers is None:
        return 0
    if not answers.is_dir():
        raise UsageError(f"{answers} is no folder")
    return _report(cases, verdict(cases, answers))


def _write(folder: Path) -> int:
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise UsageError(f"{folder} has files, and no set of vectors")
    cases = chosen(load_faults())
    if (folder / INDEX).is_file():  # what the last set had and this one has not
        for case in read(folder):
            for path in folder.glob(f"{case.name}.*"):
                path.unlink()
    size = write(folder, cases)
    ids = {name for stored in cases for name in stored.requirements}
    print(f"{len(cases)} cases of {len(ids)} of {len(REQUIREMENTS)} requirements, {size / 1e6:.1f} MB in {folder}")
    print(f"specification {SPEC_VERSION}, digest {digest(folder)}")
    without = [name for name in REQUIREMENTS if name not in ids]
    print(f"without a case: {', '.join(without) or 'none'}")
    return 0


def _report(cases: list[Read], found: Verdict) -> int:
    print(f"{found.answered} of {len(cases)} cases are answered")
    _print(found.unread)
    _print([f"{each.case}: {each.output}{each.sentence}" for each in found.differences])
    for name, violation in found.accused.items():
        row = REQUIREMENTS[name]
        token = "" if violation.token is None else f", token {violation.token}"
        print(f"\n{name} {row.level}  {row.sentence}\n  {violation.title}{token}")
        print(f"  expected {violation.expected[:300]}\n  received {violation.received[:300]}")
    if found.unexplained:
        print("\nNo requirement can be judged by these cases alone:")
        _print([f"{each.case}: {each.output}" for each in found.unexplained])
    if not found.differences and not found.unread:
        print("every answer is met")
    return 1 if found.is_wrong else 0


def _print(sentences: list[str]) -> None:
    for sentence in sentences[:SHOWN]:
        print(sentence)
    if len(sentences) > SHOWN:
        print(f"... and {len(sentences) - SHOWN} more")
