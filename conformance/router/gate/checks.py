"""conformance, router: gate. Tokens become logits."""

import numpy as np

from conformance.core.holding import array_from
from conformance.core.judge import accuse
from conformance.core.rounding import EPSILON
from conformance.router.kind import requires
from moe_ref import gate


def plain(spec) -> bool:
    return spec == type(spec)(num_experts=spec.num_choices, top_k=spec.top_k)


def hold_gate(judge, case, *, with_bias: bool) -> None:
    """The subject's logits are the reference's, within a few roundings of the sum of the absolute products."""
    rng, E, D = case.rng(), case.spec.num_experts, 5
    x_TD, gate_ED = (rng.normal(size=n).astype(np.float32) for n in ((case.num_tokens, D), (E, D)))
    bias_E = rng.normal(size=E).astype(np.float32) if with_bias else None
    returned = judge.call(case, "gate", x_TD.copy(), gate_ED.copy(), bias_E)
    found_TE = array_from(returned, "logits: no array").astype(np.float64)
    wanted_TE = gate(x_TD, gate_ED, bias_E)
    size_TE = np.abs(x_TD) @ np.abs(gate_ED).T + (0 if bias_E is None else np.abs(bias_E))
    if found_TE.shape != wanted_TE.shape:
        accuse("logits of another shape", expected=str(wanted_TE.shape), received=str(found_TE.shape))
    wrong_TE = ~(np.abs(found_TE - wanted_TE) <= 2 * (D + 1) * EPSILON[judge.subject.compute_dtype] * size_TE)
    for t, e in np.argwhere(wrong_TE):
        accuse(
            f"logit of expert {e}", token=int(t), expected=f"{wanted_TE[t, e]:.7g}", received=f"{found_TE[t, e]:.7g}"
        )


@requires("GAT-1", method="gate", spec=plain, bias=("none",))
def logits_are_tokens_times_the_gate(judge, case):
    hold_gate(judge, case, with_bias=False)


@requires("GAT-2", method="gate", spec=plain, bias=("none",), after=("GAT-1",))
def the_gate_bias_is_part_of_the_logits(judge, case):
    hold_gate(judge, case, with_bias=True)
