"""conformance, the report of load: what a page shows of a case of counts, losses, capacities and bias updates."""

from conformance.balance.case import LoadCase


def load_rows(case: LoadCase, token: int | None) -> list[tuple[str, str]]:
    """The rule, the sizes, the choice and what goes with the rule."""
    spec = case.spec
    sizes = f"num_experts={spec.num_experts} null={spec.num_null_experts} top_k={spec.top_k} tokens={case.num_tokens}"
    rule = "" if spec.rule is None else " ".join(f"{name}={value}" for name, value in spec.rule.to_dict().items())
    rows = [("sizes", sizes), ("rule", f"{type(spec.rule).__name__} {rule}".rstrip() if spec.rule else "none")]
    if spec.update is not None:
        return [*rows, ("counts", text(case.counts_SE)), ("bias", text(case.expert_bias_E))]
    rows.append(("ids", text(case.expert_ids_TK)))
    if spec.capacity is not None:
        rows.append(("weights", text(case.weights_TK)))
    elif case.num_tokens:
        t = token or 0
        rows.append((f"logits[{t}]", text(case.logits_TE[t])))
    return rows + [(name, text(value)) for name, value in case.inputs.items()]


def load_side_by_side(case: LoadCase) -> str:
    """What the reference makes of a case."""
    spec = case.spec
    rows = load_rows(case, None)
    if spec.balance is not None:
        trace = case.balance
        names = ("scores_TE", "counts_UE", "fractions_UE", "mean_scores_UE", "losses_U", "weights_U", "loss")
        rows += [(name, text(getattr(trace, name))) for name in names] + [("d_logits_TE", text(case.d_balance_TE))]
    if spec.capacity is not None:
        trace = case.limited
        names = ("capacity_U", "wanted_UE", "taken_UE", "expert_ids_TK", "weights_TK")
        rows += [(name, text(getattr(trace, name))) for name in names] + [("d_weights_TK", text(case.d_limited_TK))]
    return "\n".join(f"      {name:<21} {value}" for name, value in rows)


def text(values) -> str:
    """Numbers on one line, shortened."""
    flat = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(flat, list):
        found = "[" + " ".join(text(each) for each in flat) + "]"
    else:
        found = f"{flat:.6g}" if isinstance(flat, float) else str(flat)
    return found if len(found) <= 400 else f"{found[:400]} ..."
