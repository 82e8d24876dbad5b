"""conformance, balance: what a page of a failure and a replay show of a case."""

from conformance.balance.bounds import wanted_loss, wanted_z_loss
from conformance.balance.case import RULES, BalanceCase
from conformance.balance.verdicts import (
    bias_of_subject,
    coefficient_of_subject,
    counts_of_subject,
    kept_by_subject,
    loss_of_subject,
    quantile_of_subject,
    tokens_of_counts,
    wanted_coefficient,
    wanted_quantile,
    z_loss_of_subject,
)
from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.show import numbers, shortened, spec_fields
from moe_ref import bias_update, tokens_per_expert

MOST_ROWS = 256
"""Of the tokens of a case, before their text is shortened."""
OF_A_LOSS = ("scores_TE", "counts_UE", "fractions_UE", "mean_scores_UE", "losses_U", "weights_U")
OF_A_CAPACITY = ("capacity_U", "wanted_UE", "taken_UE", "expert_ids_TK", "weights_TK")
"""Steps of the reference that are shown."""


def rows_of_page(case: BalanceCase, token: int | None) -> list[tuple[str, str]]:
    """The rule, the sizes, the choice and what goes with the rule."""
    spec = case.spec
    sizes = f"num_experts={spec.num_experts} null={spec.num_null_experts} top_k={spec.top_k} tokens={case.num_tokens}"
    rule = "none" if spec.rule is None else f"{type(spec.rule).__name__} {spec_fields(spec.rule)}".rstrip()
    rows = [("sizes", sizes), ("rule", rule)]
    if spec.update is not None:
        return [*rows, ("counts", _text(case.counts_SE)), ("bias", _text(case.expert_bias_E))]
    if spec.sparsity is not None:
        return [*rows, ("counts", _text(case.counts_SE)), ("tokens", str(tokens_of_counts(case)))]
    if spec.quantile is not None:
        rows += [("router", spec_fields(case.router)), ("bias", _text(case.expert_bias_E))]
    rows.append(("ids", _text(case.expert_ids_TK[:MOST_ROWS])))
    if spec.capacity is not None:
        rows.append(("weights", _text(case.weights_TK[:MOST_ROWS])))
    elif case.num_tokens:
        t = token or 0
        rows.append((f"logits[{t}]", _text(case.logits_TE[t])))
    return rows + [(name, _text(value[:MOST_ROWS])) for name, value in case.inputs.items()]


def side_by_side(judge: Judge, case: BalanceCase, most_tokens: int) -> str:
    """Every step of the reference, and what the subject returned beside it."""
    lines = [f"      {name:<21} {text}" for name, text in rows_of_page(case, None)]
    for method in filter(case.spec.is_for, RULES):
        try:
            found = _of_subject(judge, case, method)
        except (NotRun, Violation) as error:
            found = {}
            lines.append(f"    {judge.name}: {method}() returned nothing that can be shown: {error}")
        for name, wanted in _of_reference(case, method).items():
            lines.append(f"      {name:<21} reference {_text(_first(name, wanted, most_tokens))}")
            if found.get(name) is not None:
                lines.append(f"      {'':<21} {judge.name:<9} {_text(_first(name, found[name], most_tokens))}")
    if case.num_tokens > most_tokens:
        lines.append(f"    and {case.num_tokens - most_tokens} more tokens")
    return "\n".join(lines)


def _of_subject(judge: Judge, case: BalanceCase, method: str) -> dict:
    """What the subject's method returns, by name."""
    if method == "load":
        return {"counts_E": counts_of_subject(judge, case)}
    if method == "bias_update":
        return {"bias_E": bias_of_subject(judge, case)}
    if method == "quantile_update":
        return {"bias_E": quantile_of_subject(judge, case)}
    if method == "next_coefficient":
        return {"coeff": coefficient_of_subject(judge, case)}
    return vars(
        {"z_loss": z_loss_of_subject, "balance_loss": loss_of_subject, "capacity": kept_by_subject}[method](judge, case)
    )


def _of_reference(case: BalanceCase, method: str) -> dict:
    """What the reference makes of the case, step by step."""
    if method == "load":
        mask_T = case.inputs.get("token_mask_T")
        return {"counts_E": tokens_per_expert(case.expert_ids_TK, case.spec.num_experts, mask_T)}
    if method == "z_loss":
        return vars(wanted_z_loss(case))
    if method == "bias_update":
        counts_E = case.counts_SE.sum(axis=0)
        return {"counts_E": counts_E, "bias_E": bias_update(counts_E, case.rule("update"), case.expert_bias_E)}
    if method == "quantile_update":
        return {"bias_E": wanted_quantile(case)}
    if method == "next_coefficient":
        return {"coeff": wanted_coefficient(case)}
    if method == "balance_loss":
        return {name: getattr(case.balance_trace, name) for name in OF_A_LOSS} | vars(wanted_loss(case))
    gradient = {"d_weights_TK": case.capacity_gradient_TK}
    return {name: getattr(case.capacity_trace, name) for name in OF_A_CAPACITY} | gradient


def _first(name: str, value, most_tokens: int):
    """The first tokens of what has a row for each of them."""
    return value[:most_tokens] if "_T" in name else value


def _text(values) -> str:
    return shortened(numbers(values))
