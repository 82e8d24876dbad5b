"""conformance, vectors: which calls are stored. Those that a few cases of each requirement make of a subject.

Nothing here names a requirement, a method or a field: what is added to the specification is in the next set.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.core.case import Case, plain
from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.kind import kind_of, settings_of
from conformance.core.register import REQUIREMENTS, stage_order
from conformance.core.trial import why_not
from conformance.router.check import RouterCheck
from conformance.router.draw import make_case
from conformance.vectors.calls import Call, Recorder, by_name
from conformance.vectors.container import packed
from conformance.vectors.expected import Expected, Unclear, expected
from moe_ref.specs.families import CHECKPOINTS, FAMILIES

EACH = 2
"""Cases of a requirement; one where the kind costs more, besides those that show faults."""
CANDIDATES = 3
"""Cases that are drawn for each of them; the one with the most that is new is taken."""
MOST_DRAWS = 150
"""For what no case of a requirement has had so far."""
MOST_BYTES = 48 * 1024
"""Of the arrays of a call, and of what it returns."""
TOKENS = 2
"""Of a router at published size."""
FAMILY_SEEDS = 40
MOST_SEARCHED = 16
MOST_SEARCHED_DEAR = 1
"""Cases that are tried for one that shows a fault; of kinds that cost more."""
MOST_TRIES = 20
"""Cases with something new that are tried besides, of each method."""
NO_FAULTS: dict[str, Fault] = {}
PUBLIC = FAMILIES | CHECKPOINTS


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A case of a requirement, by what draws it: a seed, or a family and the seed of its tokens."""

    requirement: str
    seed: int
    family: str = ""

    @property
    def check(self) -> Check:
        """That of the requirement."""
        return CHECKS[self.requirement]

    def case(self, judge: Judge) -> Case:
        """The case; the same one for every subject that takes float32 logits and supports everything."""
        if self.family:
            return self._of_family(self.check)
        return kind_of(self.requirement).draw(judge, self.check, self.seed)

    def _of_family(self, check: Check) -> Case:
        family = PUBLIC[self.family]
        assert isinstance(check, RouterCheck)
        bias = "mixed" if family.expert_bias else "none"
        return make_case(family.router, check, logits="normal", bias=bias, tokens=TOKENS, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"requirement": self.requirement, "seed": self.seed} | ({"family": self.family} if self.family else {})


@dataclass(kw_only=True, eq=False)
class Stored:
    """A call of the set, and what asks for it."""

    call: Call
    expected: Expected
    trials: list[Trial] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)

    @property
    def requirements(self) -> list[str]:
        """Those that make this call, in the order of the stages."""
        return sorted({trial.requirement for trial in self.trials}, key=stage_order)

    @property
    def name(self) -> str:
        """Stage, first requirement and six hex digits."""
        first = self.requirements[0]
        return f"{REQUIREMENTS[first].stage}/{first}-{self.call.key[:6]}"

    @property
    def level(self) -> str:
        """SHOULD where equal scores decide, or where every requirement that asks is one; else MUST."""
        levels = {REQUIREMENTS[name].level for name in self.requirements}
        return "SHOULD" if self.expected.tied or levels == {"SHOULD"} else "MUST"


def chosen(faults: Mapping[str, Fault] = NO_FAULTS) -> list[Stored]:
    """Every call of the set.

    Args:
        faults: known wrong implementations; a case that shows it is looked for, for each of them.
    """
    return Chooser(faults).run()


def fresh() -> tuple[Judge, Recorder]:
    """A judge that draws as the set was drawn, and its subject, which writes down the calls."""
    recorder = Recorder()
    return Judge(recorder), recorder


class Chooser:
    """Draws cases, and keeps what is clear and small enough."""

    def __init__(self, faults: Mapping[str, Fault]) -> None:
        self.faults = faults
        self.survivors: list[str] = []
        """Faults that no case of their requirement shows."""
        self.judge, self.recorder = fresh()
        self.found: dict[str, Stored | None] = {}
        """By the key of a call; None: it is not stored."""
        self.facts: set = set()
        self.single: set[str] = set()
        """Requirements that make one call of `route`, with what the case has; and those that make several."""
        self.several: set[str] = set()

    def run(self) -> list[Stored]:
        """Cases of each requirement, then what is new in further ones, then the families."""
        checks = [CHECKS[name] for name in sorted(CHECKS, key=stage_order)]
        checks = [check for check in checks if why_not(self.judge, check) is None]
        for check in checks:
            self._cases_of(check)
        for check in widest(self.judge, checks):
            tries = 0
            for seed in range(EACH * CANDIDATES, MOST_DRAWS):
                case = kind_of(check.requirement).draw(self.judge, check, seed)
                if tries < MOST_TRIES and facts_of(check, case) - self.facts:
                    calls = calls_of(self.judge, self.recorder, check, case)
                    self._keep(Trial(requirement=check.requirement, seed=seed), check, case, calls)
                    tries += 1
        for family in PUBLIC:
            self._family(family)
        return [stored for stored in self.found.values() if stored is not None and stored.trials]

    def _cases_of(self, check: Check) -> None:
        wanted = EACH if kind_of(check.requirement).cost == 1 else 1
        seeds = range(EACH * CANDIDATES)
        drawn = {seed: kind_of(check.requirement).draw(self.judge, check, seed) for seed in seeds}
        kept: list[Case] = []
        in_part: list[tuple[Trial, Case]] = []
        while drawn and len(kept) < wanted:
            seed = max(drawn, key=lambda seed: len(facts_of(check, drawn[seed]) - self.facts))
            case = drawn.pop(seed)
            if not self._keeps_whole(check, seed, case, kept):
                in_part.append((Trial(requirement=check.requirement, seed=seed), case))
        more = iter(range(EACH * CANDIDATES, EACH * CANDIDATES + MOST_SEARCHED))
        while not kept and (seed := next(more, None)) is not None:
            self._keeps_whole(check, seed, kind_of(check.requirement).draw(self.judge, check, seed), kept)
        for trial, case in in_part[:wanted] if not kept else ():
            self._keep(trial, check, case, calls_of(self.judge, self.recorder, check, case))
        for fault in (each for each in self.faults.values() if each.requirement == check.requirement):
            self._case_of(fault, check, kept)

    def _keeps_whole(self, check: Check, seed: int, case: Case, kept: list[Case]) -> bool:
        """Keep a case if all of its calls can be stored; whether it was."""
        calls = calls_of(self.judge, self.recorder, check, case)
        if whole := self._is_whole(calls):
            self._keep(Trial(requirement=check.requirement, seed=seed), check, case, calls)
            kept.append(case)
        return whole

    def _case_of(self, fault: Fault, check: Check, kept: list[Case]) -> None:
        """A further case, where no kept one shows the fault."""
        kind = kind_of(check.requirement)
        judge = Judge(kind.faulty(fault))
        if any(is_seen(judge, check, case) for case in kept):
            return
        more = MOST_SEARCHED if kind.cost == 1 else MOST_SEARCHED_DEAR
        for seed in range(EACH * CANDIDATES, EACH * CANDIDATES + more):
            case = kind.draw(self.judge, check, seed)
            if is_seen(judge, check, case) and self._keeps_whole(check, seed, case, kept):
                return
        self.survivors.append(fault.name)

    def _family(self, name: str) -> None:
        checks = (CHECKS[each] for each in sorted(self.single - self.several, key=stage_order))
        wanted = [check for check in checks if isinstance(check, RouterCheck)]
        for seed in range(FAMILY_SEEDS):
            case = Trial(requirement=wanted[0].requirement, seed=seed, family=name).case(self.judge)
            bias = "none" if case.expert_bias_E is None else "mixed"
            of_router = [check for check in wanted if isinstance(check, RouterCheck)]
            of_kind = [check for check in of_router if "normal" in check.logits and bias in check.bias]
            asking = [check for check in of_kind if asks(self.judge, check, case)]
            kept = [stored for call in calls_of(self.judge, self.recorder, asking[0], case).values()
                    if (stored := self._stored(call)) is not None]  # fmt: skip
            for stored in kept:
                stored.trials += [Trial(requirement=c.requirement, seed=seed, family=name) for c in asking]
                stored.tags |= case.tags
            if kept:
                return

    def _is_whole(self, calls: dict[str, Call]) -> bool:
        """Whether every call of a case can be stored: then the judge can hold answers against its requirement."""
        keys = set(self.recorder.keys)
        return bool(keys) and keys == calls.keys() and all(self._stored(call) is not None for call in calls.values())

    def _keep(self, trial: Trial, check: Check, case: Case, calls: dict[str, Call]) -> None:
        """Store the calls of a case, or those of them that can be."""
        kept = [stored for call in calls.values() if (stored := self._stored(call)) is not None]
        if check.method == "route" and not check.inputs and max(check.tokens) > 1:
            self.several |= {check.requirement} if len(calls) > 1 else set()
            self.single |= {check.requirement} if len(calls) == 1 else set()
        for stored in kept:
            stored.trials.append(trial)
            stored.tags |= case.tags
        if kept:
            self.facts |= facts_of(check, case)

    def _stored(self, call: Call) -> Stored | None:
        if call.key not in self.found:
            self.found[call.key] = stored_of(call, self.recorder.answers.get(call.key))
        return self.found[call.key]


def stored_of(call: Call, answer: Any) -> Stored | None:
    """The call with what it returns; None where that is unclear or large, or float32 does not hold it.

    Args:
        answer: what moe_ref returns in float32; None where it refuses the call.
    """
    if sum(value.nbytes for value in call.tensors.values()) > MOST_BYTES:
        return None
    try:
        found = expected(call)
    except Unclear:
        return None
    size = sum(value.nbytes for value in (*found.values.values(), *found.tolerances.values()))
    if size > MOST_BYTES or (answer is not None and not is_met(found, call, answer)):
        return None
    return Stored(call=call, expected=found)


def is_met(found: Expected, call: Call, answer: Any) -> bool:
    """Whether an answer in the same order of slots is within the tolerances."""
    own: dict[str, np.ndarray] = {}
    packed(by_name(call.method, answer), "", own)
    with np.errstate(invalid="ignore", over="ignore"):
        return all(
            (np.abs(own[name].astype(np.float64) - value) <= found.tolerances.get(name, 0)).all()
            for name, value in found.values.items()
            if name in own
        )


def calls_of(judge: Judge, recorder: Recorder, check: Check, case: Case) -> dict[str, Call]:
    """The calls that a check makes on a case, by key."""
    recorder.calls.clear()
    judge.memory.pop("observed", None)
    try:
        judge.run(check, case)
    except (NotRun, Violation):
        return {}
    found: dict[str, Call] = {}
    returned: set[bytes] = set()
    for call in recorder.calls:
        # What float32 returned is given to a later call: its last bits are those of this machine.
        if not returned & floats_of(call.tensors):
            found[call.key] = call
        if call.key in recorder.answers:  # else it was refused
            answer: dict[str, np.ndarray] = {}
            packed(by_name(call.method, recorder.answers[call.key]), "", answer)
            returned |= floats_of(answer)
    return found


def floats_of(tensors: dict[str, np.ndarray]) -> set[bytes]:
    """The bytes of arrays of numbers that are not all alike."""
    return {v.tobytes() for v in tensors.values() if v.dtype.kind == "f" and v.size > 1 and np.ptp(v) != 0}


def is_seen(judge: Judge, check: Check, case: Case) -> bool:
    """Whether a subject violates the requirement on a case."""
    try:
        judge.run(check, case)
    except Violation:
        return True
    except NotRun:
        pass
    return False


def asks(judge: Judge, check: Check, case: Case) -> bool:
    """Whether a case is one of a check."""
    return check.wants(case) and all(condition.holds(judge, case) for condition in check.given)


def facts_of(check: Check, case: Case) -> set[tuple[str, str, Any]]:
    """(method, name, value) of everything that the specs of a case say; of sizes only which there are."""
    found: set[tuple[str, str, Any]] = set()
    for name, spec in {"spec": case.spec, "layout": getattr(case, "layout", None)}.items():
        if spec is not None:
            found |= {(check.method, path, value) for path, value in leaves(plain(spec.to_dict()), name)}
    return found | {(check.method, "inputs", name) for name in case.inputs}


def leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of plain data; of numbers that are sizes, whether there is more than one."""
    if isinstance(data, dict):
        for name, each in data.items():
            yield from leaves(each, f"{path}.{name}")
    elif isinstance(data, (list, tuple)):
        yield path, len(data)
    else:
        yield path, data if isinstance(data, (str, bool)) or data is None else np.sign(data) * min(abs(data), 3)


def widest(judge: Judge, checks: list[Check]) -> list[Check]:
    """For each method the check with the most settings, the first of them where several have."""
    by_method: dict[str, Check] = {}
    size: Callable[[Check], int] = lambda check: len(settings_of(judge, check)[0])  # noqa: E731
    for check in checks:
        if check.method not in by_method or size(check) > size(by_method[check.method]):
            by_method[check.method] = check
    return list(by_method.values())
