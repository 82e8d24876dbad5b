"""conformance, identify: what a reader sees. The spec, its families, what is open; or the smallest input that differs.

Legend: T tokens, C columns, E choices.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import numpy as np

from conformance.core.fault import Fault
from conformance.core.judge import Judge
from conformance.core.show import numbers
from conformance.core.subject import Routing, Subject, Unsupported
from conformance.identify.box import Malformed, Question
from conformance.identify.choice import Guess, Holder, groupings
from conformance.identify.equal import normal
from conformance.identify.search import Identity
from conformance.router.bounds import expected_weights
from conformance.router.case import RouterCase, held
from conformance.router.faulty import FaultyRouter
from conformance.router.page import rows_of_page
from moe_ref import RouterSpec
from moe_ref.specs.families import FAMILIES

NUMBERS = ("route_scale", "logit_scale", "logit_softcap", "norm_eps", "mixer_eps", "router_dtype")
"""What the config of a model sets; families with other values compute the same otherwise."""
TRIES = 250
MOST_NAMES, MOST_NEAR, MOST_GROUPINGS = 3, 5, 150
ENOUGH, EXPLAINED = 12, 0.97
"""Tokens after which a fault that explains few is given up, and the share that one has to explain."""
COARSER = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Named:
    """The families of a spec."""

    exact: list[str]
    """Those whose router has this normal form at the box's sizes."""
    other_numbers: dict[str, str]
    """Name -> the numbers in which it differs."""
    nearest: dict[str, str]
    """Where none is exact: name -> the fields in which it differs, the fewest first."""


def families_of(found: Identity) -> Named:
    """The families whose router, with the sizes of the box, is the one that was found."""
    spec, takes = found.spec, found.box.takes_bias and found.guess.bias_used
    exact, numbers_, nearest = [], {}, {}
    for name, family in FAMILIES.items():
        # Its tiny router has the settings that the published one leaves off, such as groups.
        differing = [_differing(spec, each, takes) for each in (family.router, family.tiny)]
        least = min(differing, key=len)
        if not least:
            exact.append(name)
        elif set(least) <= set(NUMBERS):
            numbers_[name] = _shown(least)
        elif "sizes" not in least:
            nearest[name] = _shown(least)
    fewest = min((text.count("=") for text in nearest.values()), default=0)
    near = {name: text for name, text in nearest.items() if text.count("=") == fewest}
    return Named(exact=exact, other_numbers=numbers_, nearest={} if exact or numbers_ else near)


def _differing(spec: RouterSpec, other: RouterSpec, takes_bias: bool) -> dict[str, Any]:
    """Field -> the value of another router, in whatever its normal form differs at the sizes of this one."""
    sizes: dict[str, Any] = {name: getattr(spec, name) for name in ("top_k", "num_scored_shared_experts")}
    grouped = spec.num_expert_groups is not None and (other.num_expert_groups or 1) > 1
    if grouped:
        sizes |= {name: getattr(spec, name) for name in ("num_expert_groups", "num_limited_groups")}
    null = min(other.num_null_experts, spec.num_choices - 1)
    sizes |= {"num_experts": spec.num_choices - null, "num_null_experts": null}
    if not other.num_scored_shared_experts:
        sizes["num_scored_shared_experts"] = 0
    try:
        own, others = normal(spec, takes_bias)[0], normal(other.replace(**sizes), takes_bias)[0]
    except ValueError:  # it has no router of these sizes
        return {"sizes": "others"}
    found = {each.name: getattr(others, each.name) for each in fields(own)}
    return {name: value for name, value in found.items() if not _alike(value, getattr(own, name))}


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float) and np.isfinite([value, other]).all():
        return abs(value - other) <= 1e-4 * max(abs(value), abs(other))
    return value == other


def _shown(values: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


# a router that fits nothing


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The smallest input on which a box is not the nearest spec."""

    case: RouterCase
    question: Question
    title: str


def smallest_difference(found: Identity) -> Difference:
    """One token that the nearest spec does not explain, with no bias where none is needed, in round numbers."""
    holder = Holder(found.box, Judge(found.box.subject))
    by_bias = sorted(
        found.wrong, key=lambda pair: (pair[0].bias_E is not None, float(np.abs(pair[0].logits_TC[pair[1]]).max()))
    )
    question, t = by_bias[0]
    question = question.tokens(np.array([t]))
    case, tries, changed = found.guess.case(question, found.box.dtype), 0, True
    while changed and tries < TRIES:
        changed = False
        for smaller in _smaller(case):
            tries += 1
            asked = _asked(found, holder, smaller)
            if asked is not None:
                case, question, changed = smaller, asked, True
                break
            if tries >= TRIES:
                break
    other = holder.other_choice(found.guess, question)
    title = "other experts are chosen" if other else "the weights differ"
    return Difference(case=case, question=question, title=title)


def _smaller(case: RouterCase) -> Iterator[RouterCase]:
    """Simpler neighbours; those of a case, and single numbers made 0."""
    for each in case.simpler():
        yield each.with_(logits_TE=each.logits_TE + 0.0)  # -0 is 0
    for name in ("logits_TE", "expert_bias_E"):
        values = getattr(case, name)
        if values is None:
            continue
        for place in np.ndindex(values.shape):
            if values[place]:
                zeroed = values.copy()
                zeroed[place] = 0
                yield case.with_(**{name: zeroed})


def _asked(found: Identity, holder: Holder, case: RouterCase) -> Question | None:
    """The answer of the box, where the nearest spec does not explain it."""
    if case.expert_bias_E is not None and not case.expert_bias_E.any():
        case = case.with_(expert_bias_E=None)
    try:
        question = found.box.ask(case.logits_TE, case.expert_bias_E, plain=True)
        return question if holder.wrong(found.guess, question) else None
    except (Unsupported, Malformed, ValueError):
        return None


def known_faults(found: Identity, faults: dict[str, Fault]) -> tuple[Guess, list[Fault]]:
    """A spec and the known faults of routers that together explain every answer; the nearest spec where none do."""
    own = [fault for fault in faults.values() if fault.kind.name == "router" and fault.method == "route"]
    wrong = sorted({id(question): question for question, _ in found.wrong}.values(), key=lambda q: -len(q.logits_TC))
    rest = [question for question in found.questions if not any(question is each for each in wrong)]
    of_groups = [fault for fault in own if fault.stage == "groups"]
    tried = [
        *((guess, own) for guess in _unlike(found.near)[:MOST_NEAR]),
        *((guess, of_groups) for guess in _regrouped(found)),
    ]
    for guess, some in tried:
        fitting = [fault for fault in some if _explains(fault, guess, found, [*wrong, *rest])]
        if fitting:
            return guess, fitting
    return found.guess, []


def _unlike(near: list[Guess]) -> list[Guess]:
    """The nearest of the guesses that differ in a scale or an eps alone."""
    found: dict[tuple, Guess] = {}
    for guess in near:
        found.setdefault((guess.spec.replace(route_scale=1.0, norm_eps=0.0), guess.bias_used), guess)
    return list(found.values())


def _regrouped(found: Identity) -> Iterator[Guess]:
    """The nearest spec with every grouping, where a choice without a bias is not explained."""
    holder, spec = Holder(found.box, Judge(found.box.subject)), found.guess.spec
    free = [question for question in found.questions if question.bias_E is None]
    if spec.selector == "top_k" and any(holder.other_choice(found.guess, question) for question in free):
        for groups in islice(groupings(spec.num_experts, spec.top_k), MOST_GROUPINGS):
            if groups["group_score_k"] <= 2:
                with suppress(ValueError):
                    yield Guess(spec=spec.replace(**groups))


def _explains(fault: Fault, guess: Guess, found: Identity, questions: list[Question]) -> bool:
    """Whether a spec with a fault answers as the box does, but for near ties, which are few."""
    same = total = 0
    for question in questions:
        case = guess.case(question, found.box.dtype)
        try:
            routing = FaultyRouter(fault).route(case.logits_TE, case.spec, case.expert_bias_E, **case.inputs)
        except Exception:
            return False
        same, total = same + _same(routing, question), total + case.num_tokens
        if same < (0.8 if total >= ENOUGH else 0.25) * total:
            return False
    return same >= EXPLAINED * total


def _same(routing: Routing, question: Question) -> int:
    """Tokens with the same experts and weights, in whatever order."""
    ids_TK, weights_TK = np.asarray(routing.expert_ids_TK), np.asarray(routing.weights_TK)
    if ids_TK.shape != question.expert_ids_TK.shape:
        return 0
    order, other = np.argsort(ids_TK, axis=-1), np.argsort(question.expert_ids_TK, axis=-1)
    take = np.take_along_axis
    same_T = (take(ids_TK, order, -1) == take(question.expert_ids_TK, other, -1)).all(axis=-1)
    close_TK = np.isclose(take(weights_TK, order, -1), take(question.weights_TK, other, -1), rtol=1e-4, atol=1e-30)
    return int((same_T & close_TK.all(axis=-1)).sum())


def rounded_somewhere(found: Identity) -> str | None:
    """A sentence where roundings to a coarser dtype explain every answer that those of float32 do not, else None."""
    for dtype in COARSER:
        exact, coarse = Judge(found.box.subject), Judge(_Coarse(dtype))
        with suppress(ImportError):  # bfloat16 arrays are of ml_dtypes
            rounded = [replace(each, logits_TC=held(each.logits_TC, dtype)) for each in found.questions]
            if _all_explained(Holder(found.box, exact), found.guess, rounded):
                return f"the logits are rounded to {dtype} before all else: that explains every answer"
        if _all_explained(Holder(found.box, coarse), found.guess, found.questions):
            return f"something is rounded to {dtype}: such roundings explain every answer"
    return None


class _Coarse(Subject):
    """Stands for a router that computes in a coarser dtype."""

    def __init__(self, dtype: str):
        self.compute_dtype = dtype


def _all_explained(holder: Holder, guess: Guess, questions: list[Question]) -> bool:
    return not any(holder.wrong(guess, question) for question in questions)


# the text


def text(found: Identity, faults: dict[str, Fault]) -> str:
    """The answer, as it is printed."""
    box, told = found.box, found.box.handed.top_k
    causes: list[Fault] = []
    if not found.fits:
        guess, causes = known_faults(found, faults)
        if guess is not found.guess:
            holder = Holder(box, Judge(box.subject))
            wrong = [(question, t) for question in found.questions for t in holder.wrong(guess, question)]
            found = replace(found, guess=guess, wrong=wrong)
    takes = "a bias" if box.takes_bias else f"no bias ({box.why_no_bias})"
    lines = [
        f"{_name(found)}: {box.columns} columns, {box.top_k} experts for each token, takes {takes}",
        f"asked {box.tokens} tokens in {box.calls} calls",
        "",
        f"{'spec' if found.fits else 'nearest':<9} {_spec_text(found.guess.spec)}",
        *_family_lines(families_of(found)),
    ]
    lines += [f"note      {note}" for note in found.notes]
    lines += [f"refused   {count} tokens: {sentence}" for sentence, count in box.refused.items()]
    if not found.fits:
        lines += ["", *_difference_lines(found, causes)]
    elif box.top_k != told:
        lines += ["", *_told_lines(found)]
    else:
        lines += ["", *_open_lines(found)]
    return "\n".join(lines)


def _name(found: Identity) -> str:
    return found.box.subject.name or type(found.box.subject).__name__


def _spec_text(spec: RouterSpec) -> str:
    return _shown(spec.to_dict())


def _family_lines(named: Named) -> list[str]:
    """Families that have the spec, by the numbers in which they differ."""
    lines = [f"families  {', '.join(named.exact) or 'none has it'}"]
    for names, how in ((named.other_numbers, "with"), (named.nearest, "nearest, with")):
        for numbers_ in sorted(set(names.values())):
            lines.append(f"          {how} {numbers_}: {', '.join(k for k, own in names.items() if own == numbers_)}")
    return lines


def _open_lines(found: Identity) -> list[str]:
    """What could not be told apart, a line for each reason."""
    own = found.spec.to_dict()
    by_reason: dict[tuple[bool, str], list[str]] = {}
    for each in found.open:
        other = each.spec.to_dict()
        changed = {k: getattr(each.spec, k) for k in {**own, **other} if other.get(k, "") != own.get(k, "")}
        by_reason.setdefault((not each.proven, each.why), []).append(_shown(changed))
    if not by_reason:
        return ["every other spec that was tried is told apart"]
    lines = ["not told apart from"]
    for (unproven, why), specs in sorted(by_reason.items()):
        lines += [f"    {' | '.join(dict.fromkeys(specs))}", f"        {'' if unproven else 'proven: '}{why}"]
    return lines


def _difference_lines(found: Identity, causes: list[Fault]) -> list[str]:
    wrong, total = len(found.wrong), sum(len(question.logits_TC) for question in found.questions)
    biased = sum(question.bias_E is not None for question, _ in found.wrong)
    small = smallest_difference(found)
    rows = [("looks like", f"{fault.name}: {fault.summary} {fault.link}".rstrip()) for fault in causes[:MOST_NAMES]]
    if not causes and (sentence := rounded_somewhere(found)):
        rows.append(("looks like", sentence))
    where = ", all of them with a bias" if biased == wrong else ""
    return [
        f"It fits no spec: {wrong} of {total} tokens are not explained{where}. The smallest of them:",
        "",
        *_page(found, small.title, small.case, small.question, rows),
    ]


def _told_lines(found: Identity) -> list[str]:
    """One token, where the number of experts is not the one that was told."""
    told = found.spec.replace(top_k=found.box.handed.top_k)
    question = found.box.ask(np.zeros((1, found.box.columns)), plain=True)
    case = Guess(spec=told).case(question, found.box.dtype)
    lines = ["It is this spec, but for the top_k that it is told. The smallest input that shows it:", ""]
    return [*lines, *_page(found, "another number of experts is chosen", case, question, [])]


def _page(found: Identity, title: str, case: RouterCase, question: Question, rows: list) -> list[str]:
    """Expected and received for one token, as the page of a failure shows them."""
    trace, ids_K = case.reference, question.expert_ids_TK[0]
    wanted = trace.expert_ids_TK[0], trace.weights_TK[0]
    if set(wanted[0]) == set(ids_K):
        wanted = ids_K, expected_weights(case, question.expert_ids_TK)[0]
    rows = [
        ("expected", f"experts {numbers(wanted[0])} weigh {numbers(wanted[1])}"),
        ("received", f"experts {numbers(ids_K)} weigh {numbers(question.weights_TK[0])}"),
        ("", ""),
        *rows_of_page(case, 0),
        *rows,
    ]
    width = max(len(name) for name, _ in rows)
    return [f"    {_name(found)}: {title}, token 0", *(f"    {name:<{width}}  {each}".rstrip() for name, each in rows)]
