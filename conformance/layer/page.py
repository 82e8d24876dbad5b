"""conformance, layer: what a page of a failure and a replay show of a case."""

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.show import numbers, spec_fields
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import output_of_subject
from moe_ref.specs.base import Spec


def rows_of_page(case: LayerCase, token: int | None) -> list[tuple[str, str]]:
    """The specs, and the token with its experts; the file of the case has the parameters."""
    return rows_of_spec(case) + rows_of_token(case, token)


def rows_of_spec(case: LayerCase) -> list[tuple[str, str]]:
    """The specs, and how many rows each expert has."""
    spec = case.spec
    gate_bias = " gate_bias=True" if spec.gate_bias else ""
    return [
        ("router", f"{spec_fields(spec.router)}{gate_bias} tokens={case.num_tokens}"),
        ("experts", spec_fields(spec.experts)),
        *([] if spec.latent is None else [("latent", spec_fields(spec.latent))]),
        ("shared", "none" if spec.shared is None else spec_fields(spec.shared)),
        ("rows", f"{numbers(case.reference.permutation.tokens_per_expert_E)} of each expert"),
    ]


def rows_of_token(case: LayerCase, token: int | None) -> list[tuple[str, str]]:
    """The token with its experts, or the first one; the selection bias, and the further inputs."""
    rows, routing, t = [], case.reference.routing, token if token is not None else 0
    if case.num_tokens:
        rows += [
            (f"token[{t}]", numbers(case.x_TD[t])),
            (f"ids[{t}]", f"{numbers(routing.expert_ids_TK[t])} of its own router"),
            (f"weights[{t}]", numbers(routing.weights_TK[t])),
        ]
    if case.params.expert_bias_E is not None:
        rows.append(("bias", numbers(case.params.expert_bias_E)))
    further = {n: v if not isinstance(v, Spec) else spec_fields(v) for n, v in case.inputs.items()}
    return rows + [(name, numbers(value)) for name, value in further.items()]


def side_by_side(judge: Judge, case: LayerCase, most_tokens: int = 4) -> str:
    """Each token's way through the reference, and the subject's output beside it where it has whole layers."""
    lines, trace = [], case.reference
    try:
        found_TD = output_of_subject(judge, case)
    except (NotRun, Violation) as error:
        found_TD = None
        lines.append(f"    {judge.name} returned no output of the layer: {error}")
    for t in range(min(case.num_tokens, most_tokens)):
        lines.append(f"    token {t}")
        for name, values in (
            ("x_TD", trace.x_TD),
            ("expert_ids_TK", trace.routing.expert_ids_TK),
            ("weights_TK", trace.routing.weights_TK),
            ("slot_outputs_TKD", trace.slot_outputs_TKD),
            ("shared_TD", trace.shared_TD),
            ("output_TD", trace.output_TD),
        ):
            lines.append(f"      {name:<21} reference {numbers(values[t])}")
        if found_TD is not None:
            lines.append(f"      {'':<21} {judge.name:<9} {numbers(found_TD[t])}")
    if case.num_tokens > most_tokens:
        lines.append(f"    and {case.num_tokens - most_tokens} more tokens")
    return "\n".join(lines)
