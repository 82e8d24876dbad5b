"""conformance, router: what a page of a failure and a replay show of a case."""

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.show import numbers, shortened, spec_fields
from conformance.router.case import RouterCase
from conformance.router.observation import observe


def row(values) -> str:
    """Numbers, shortened where a router has hundreds of experts."""
    return shortened(numbers(values))


def rows_of_page(case: RouterCase, token: int | None) -> list[tuple[str, str]]:
    """The spec, and the token with its logits, scores and bias."""
    rows = [("spec", f"{spec_fields(case.spec)} tokens={case.num_tokens} dtype={case.dtype}")]
    t = token if token is not None else 0
    if case.num_tokens:
        rows.append((f"logits[{t}]", row(case.logits_TE[t])))
        trace = case.reference if case.is_routable else None
        if trace is not None and trace.scores_TE is not None:
            rows.append((f"scores[{t}]", row(trace.scores_TE[t])))
    if case.expert_bias_E is not None:
        rows.append(("bias", row(case.expert_bias_E)))
    return rows + [(name, row(value)) for name, value in case.inputs.items()]


def side_by_side(judge: Judge, case: RouterCase, most_tokens: int = 4) -> str:
    """Every stage of the reference for each token, and what the subject returned beside it."""
    lines, trace = [], case.reference if case.is_routable else None
    try:
        seen = observe(judge, case)
    except (NotRun, Violation) as error:
        seen = None
        lines.append(f"    {judge.name} returned nothing that can be shown: {error}")
    for t in range(min(case.num_tokens, most_tokens)):
        lines.append(f"    token {t}")
        for name in (
            "logits_TE",
            "scores_TE",
            "scores_for_choice_TE",
            "group_scores_TG",
            "group_ids_TL",
            "expert_ids_TK",
            "weights_TK",
            "shared_weights_TS",
        ):
            wanted, found = getattr(trace, name, None), getattr(seen, name, None)
            if wanted is None and trace is not None:
                continue  # the spec has no such stage
            known = [(who, value) for who, value in (("reference", wanted), (judge.name, found)) if value is not None]
            for place, (who, value) in enumerate(known):
                lines.append(f"      {'' if place else name:<21} {who:<9} {row(value[t])}")
    if case.num_tokens > most_tokens:
        lines.append(f"    and {case.num_tokens - most_tokens} more tokens")
    return "\n".join(lines)
