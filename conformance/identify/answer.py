"""conformance, identify: the answer as text. A spec, its families, what is open; or the smallest input that differs."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import Fault
from conformance.core.show import numbers
from conformance.identify.box import Question
from conformance.identify.choice import Guess, Holder
from conformance.identify.misfit import known_faults, rounded_somewhere, smallest_difference
from conformance.identify.named import Named, families_of, shown_fields
from conformance.identify.search import Identity
from conformance.router.bounds import expected_weights
from conformance.router.case import RouterCase
from conformance.router.page import rows_of_page

MOST_NAMES = 3


def text(found: Identity, faults: dict[str, Fault]) -> str:
    """The answer, as it is printed."""
    box, told = found.box, found.box.handed.top_k
    causes: list[Fault] = []
    if not found.fits:
        guess, causes = known_faults(found, faults)
        if guess is not found.guess:
            holder = Holder(box)
            wrong = [(question, t) for question in found.questions for t in holder.wrong(guess, question)]
            found = replace(found, guess=guess, wrong=wrong)
    takes = "a bias" if box.takes_bias else f"no bias ({box.why_no_bias})"
    lines = [
        f"{_name(found)}: {box.columns} columns, {box.top_k} experts for each token, takes {takes}",
        f"asked {box.tokens} tokens in {box.calls} calls",
        "",
        f"{'spec' if found.fits else 'nearest':<9} {shown_fields(found.guess.spec.to_dict())}",
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
        by_reason.setdefault((not each.proven, each.why), []).append(shown_fields(changed))
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
