"""conformance, vectors: a set held against its index, and answers held against a set.

Answers are first compared number by number, as a reader in another language does it. Where one differs, the judge runs
the requirements whose cases have that call, with the answers as the subject: it says which one is violated.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.register import REQUIREMENTS, stage_order
from conformance.vectors.calls import Answers
from conformance.vectors.choose import Trial, calls_of, fresh, stored_of
from conformance.vectors.container import laid_out
from conformance.vectors.files import INDEX, SUFFIXES, Read, data_of
from moe_ref.specs.readers.tensors import Tensors


def damages(folder: Path, cases: list[Read]) -> Iterator[str]:
    """A sentence for each file that is not what the index says, and for each that the index does not have."""
    known = {INDEX}
    for case in cases:
        for suffix in SUFFIXES:
            name = case.name + suffix
            known.add(name)
            try:
                found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            except OSError as error:
                yield f"{name}: {error.strerror}"
                continue
            if found != case.entry["sha256"][suffix]:
                yield f"{name}: its SHA-256 is {found[:12]}..., the index has {case.entry['sha256'][suffix][:12]}..."
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            yield f"{name}: the index does not have it"


def inconsistencies(case: Read) -> Iterator[str]:
    """A sentence for each tensor whose three forms differ."""
    entries, data = laid_out(case.tensors)
    if data != (case.folder / f"{case.name}.bin").read_bytes():
        yield f"{case.name}.bin: not the data of the safetensors file"
    for name, entry in case.definition["tensors"].items():
        own = entries.get(name, {})
        wrong = {key for key in own if own[key] != entry.get(key)}
        if wrong or not own:
            yield f"{case.name}.json: {name} has another {', '.join(sorted(wrong)) or 'name'} than the safetensors file"


def other_bytes(cases: list[Read]) -> Iterator[str]:
    """A sentence for each case that this machine computes otherwise: its first trial is drawn and run again."""
    judge, recorder = fresh()
    for case in cases:
        trial = Trial(**case.entry["trials"][0])
        calls = calls_of(judge, recorder, trial.check, trial.case(judge))
        if case.entry["key"] not in calls:
            yield f"{case.name}: other inputs are drawn here"
        elif (stored := stored_of(calls[case.entry["key"]])) is None:
            yield f"{case.name}: its values are not clear here"
        elif data_of(stored)[1] != (case.folder / f"{case.name}.bin").read_bytes():
            yield f"{case.name}: other values are computed here"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One output of one case that is not met."""

    case: str
    output: str
    sentence: str
    level: str


def differences(case: Read, answer: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    """Outputs of an answer that are not met; one that the answer has not got is not compared."""
    outputs = case.outputs
    order_TK = by_id(outputs.get("expert_ids_TK")), by_id(answer.get("expert_ids_TK"))
    for name in sorted(outputs.keys() & answer.keys()):
        wanted, found = outputs[name], np.asarray(answer[name])
        if wanted.shape != found.shape:
            sentence = f"has the shape {list(found.shape)}, not {list(wanted.shape)}"
        else:
            sentence = _difference(wanted, found, np.broadcast_to(case.tolerance(name), wanted.shape),
                                   case.order(name), order_TK)  # fmt: skip
        if sentence:
            yield Difference(case=case.name, output=name, sentence=sentence, level=case.entry["level"])


def by_id(expert_ids_TK: np.ndarray | None) -> np.ndarray | None:
    """(T, K) the order of the slots of each token by expert."""
    return None if expert_ids_TK is None else np.argsort(expert_ids_TK, axis=-1, kind="stable")


def _difference(wanted: np.ndarray, found: np.ndarray, tolerance: np.ndarray, order: str, order_TK: tuple) -> str:
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    if order == "sorted":
        wanted, found = np.sort(wanted, axis=-1), np.sort(found, axis=-1)
    if order == "slots" and all(each is not None for each in order_TK):
        wanted, tolerance = (np.take_along_axis(each, order_TK[0], axis=-1) for each in (wanted, tolerance))
        found = np.take_along_axis(found, order_TK[1], axis=-1)
    with np.errstate(invalid="ignore"):
        wrong = np.argwhere(~(np.abs(found - wanted) <= tolerance))
    if not len(wrong):
        return ""
    at = tuple(wrong[0].tolist())
    within = f" within {tolerance[at]:.3g}" if tolerance[at] else ""
    others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    how = {"sorted": " in ascending order", "slots": " by expert id"}.get(order, "")
    return f"{list(at)}{how} is {found[at]:.9g}, not {wanted[at]:.9g}{within}{others}"


@dataclass(kw_only=True)
class Verdict:
    """What answers are worth."""

    answered: int = 0
    differences: list[Difference] = field(default_factory=list)
    accused: dict[str, Violation] = field(default_factory=dict)
    """By requirement, the earliest stage first."""
    unread: list[str] = field(default_factory=list)
    """Sentences about answers that are none."""
    unexplained: list[Difference] = field(default_factory=list)
    """Of cases whose requirements hold, as far as the answers say."""

    @property
    def is_wrong(self) -> bool:
        """Whether a MUST is violated, or something differs that no requirement forgives."""
        musts = any(REQUIREMENTS[name].level == "MUST" for name in self.accused)
        return musts or bool(self.unread) or any(each.level == "MUST" for each in self.unexplained)


def verdict(cases: list[Read], answers: Path) -> Verdict:
    """Answers in a folder, as `NAME.safetensors` with the tensors of the outputs."""
    found, read, wrong = Verdict(), {}, []
    known = {f"{case.name}.safetensors" for case in cases}
    for path in sorted(answers.rglob("*.safetensors")):
        if path.relative_to(answers).as_posix() not in known:
            found.unread.append(f"{path.relative_to(answers).as_posix()} is no case of the set")
    for case in cases:
        path = answers / f"{case.name}.safetensors"
        if not path.is_file():
            continue
        try:
            own = dict(Tensors(path))
        except ValueError as error:
            found.unread.append(str(error))
            continue
        found.answered += 1
        own = {name.removeprefix("out."): value for name, value in own.items()}
        for name in sorted(own.keys() - case.outputs.keys()):
            found.unread.append(
                f"{case.name}: there is no output {name!r}; there are {', '.join(sorted(case.outputs))}"
            )
        read[case.entry["key"]] = own
        if here := list(differences(case, own)):
            found.differences += here
            wrong.append(case)
    returns = {case.entry["key"]: _bare(case.definition["returns"]) for case in cases if case.entry["key"] in read}
    judge = Judge(Answers(tensors=read, returns=returns))
    forgiven = []
    for case in wrong:
        violations = list(accusations(judge, case))
        for violation in violations:
            found.accused.setdefault(violation.requirement, violation)
        forgiven += [] if violations else [case.name]
    found.accused = dict(sorted(found.accused.items(), key=lambda item: stage_order(item[0])))
    found.unexplained = [each for each in found.differences if each.case in forgiven]
    return found


def accusations(judge: Judge, case: Read) -> Iterator[Violation]:
    """What the judge finds on the cases that make this call."""
    for trial in (Trial(**each) for each in case.entry["trials"]):
        check = CHECKS.get(trial.requirement)
        if check is None:  # of another version
            continue
        judge.memory.pop("observed", None)
        try:
            judge.run(check, trial.case(judge))
        except NotRun:
            continue
        except Violation as violation:
            try:
                yield judge.blame(check, violation)
            except NotRun:
                continue


def _bare(data: object) -> object:
    return json.loads(json.dumps(data).replace('{"tensor": "out.', '{"tensor": "'))
