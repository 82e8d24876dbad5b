"""conformance, the verdicts on layers: calls each stage of a subject, and holds what returns against the reference.

Each call checks the form of the result, and blames the requirement that it is given.

Legend: T tokens, K top_k, D model dim, E experts, N used slots, R rows.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields

import numpy as np

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.rounding import EPSILON
from conformance.layer import bounds as layer_bounds
from conformance.layer.balls import Ball, exact, feed_forward, narrower
from conformance.layer.case import LayerCase
from conformance.router.bounds import choice_error, unlimited_choice
from conformance.router.verdicts import selection_differs, weights_differ
from moe_ref import UNUSED, LayerParams
from moe_ref.experts import combine, run_experts
from moe_ref.permute import unpermute

FORM = {"permute": "PRM-1", "experts": "EXP-1", "combine": "CMB-1", "layer": "LAY-1", "layer_gradients": "BWD-1"}
"""The requirement that a method runs at all, and returns what has the right shape."""


def dtypes(judge: Judge) -> tuple[str, str]:
    """The dtype in which the subject computes, and that of its experts, which is no wider."""
    return judge.subject.compute_dtype, narrower(judge.subject.compute_dtype, judge.subject.expert_dtype)


def stable_T(case: LayerCase, dtype: str) -> np.ndarray:
    """(T,) whether the choice of experts is the same for all choice scores within the error of a dtype.

    A token for which it is not is not judged: with other experts its whole output is another.
    """
    spec, router = case.spec.router, case.router_case
    if spec.selector != "top_k" or case.num_tokens == 0:
        return np.ones(case.num_tokens, dtype=bool)
    trace = router.reference
    from_logits_T1 = 2 * spec.logit_scale * layer_bounds.gate(case, dtype).radius.max(axis=-1, keepdims=True)
    from_logits_TE = from_logits_T1 * (1 if spec.select_by == "logit" else trace.scores_TE)
    error_TE = choice_error(router, dtype) + from_logits_TE
    chosen_TE = np.zeros(error_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, np.maximum(trace.expert_ids_TK, 0), True, axis=-1)
    choice_TE = trace.scores_for_choice_TE
    worst_in_T = np.where(chosen_TE, choice_TE - error_TE, np.inf).min(axis=-1)
    best_out_T = np.where(chosen_TE, -np.inf, choice_TE + error_TE).max(axis=-1)
    return (worst_in_T > best_out_T) & _stable_groups_T(router, error_TE, dtype) | ~case.valid_T


def _stable_groups_T(router, error_TE, dtype: str):
    spec, T = router.spec, router.num_tokens
    if spec.num_expert_groups is None or spec.num_limited_groups == spec.num_expert_groups:
        return np.ones(T, dtype=bool)
    choice_TGP = unlimited_choice(router).reshape(T, spec.num_expert_groups, -1)
    scores_TG = np.sort(choice_TGP, axis=-1)[:, :, -spec.group_score_k :].sum(axis=-1)
    slack_T = spec.group_score_k * (error_TE.max(axis=-1) + EPSILON[dtype] * np.abs(choice_TGP).max(axis=(1, 2)))
    in_order_TG = -np.sort(-scores_TG, axis=-1)
    L = spec.num_limited_groups
    return in_order_TG[:, L - 1] - in_order_TG[:, L] > 2 * slack_T


def judged_T(judge: Judge, case: LayerCase) -> np.ndarray:
    """(T,) the tokens whose choice of experts is beyond doubt; the others are counted as near ties."""
    clear_T = stable_T(case, judge.subject.compute_dtype)
    judge.near_ties(int((~clear_T).sum()))
    return clear_T


# calling a subject


@contextmanager
def blaming(case: LayerCase):
    """A violation in here is shown, and replayed, as one of this case: it makes its variations itself."""
    try:
        yield
    except Violation as violation:
        violation.case = case
        raise


def permuted(judge: Judge, case: LayerCase, expert_ids_TK, num_experts: int):
    """The subject's order and counts, as int64."""
    returned = judge.call(case, "permute", expert_ids_TK.copy(), num_experts)
    try:
        order_N, counts_E = (np.asarray(each) for each in returned)
    except (TypeError, ValueError):
        raise Violation("not two arrays", expected="(order_N, counts)", received=str(returned)) from None
    for name, found in (("order", order_N), ("counts", counts_E)):
        if found.dtype.kind not in "iu" or found.ndim != 1:
            accuse(f"the {name} are not integers of one axis", expected="integers", received=f"{found.dtype}{list(found.shape)}")  # fmt: skip
    if len(counts_E) != num_experts:
        accuse("counts of another length", expected=str(num_experts), received=str(len(counts_E)))
    return order_N.astype(np.int64), counts_E.astype(np.int64)


def expert_rows(judge: Judge, case: LayerCase, rows_RD, tokens_per_expert_E) -> np.ndarray:
    """The subject's (R, D) outputs of rows sorted by expert."""
    given = (rows_RD.astype(np.float32), tokens_per_expert_E.copy(), case.params.astype(np.float32), case.spec)
    return _array(case, judge.call(case, "experts", *given), rows_RD.shape)


def combined(judge: Judge, case: LayerCase, rows_ND, order_N, weights_TK) -> np.ndarray:
    """The subject's (T, D) weighted sums."""
    given = (rows_ND.astype(np.float32), order_N.copy(), weights_TK.astype(np.float32), case.spec)
    shape = (len(weights_TK), case.spec.experts.dim)
    return _array(case, judge.call(case, "combine", *given), shape)


def output(judge: Judge, case: LayerCase) -> np.ndarray:
    """The subject's (T, D) output of the whole layer."""
    given = (case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec)
    return _array(case, judge.call(case, "layer", *given, **case.inputs), case.x_TD.shape)


def gradients(judge: Judge, case: LayerCase) -> dict[str, np.ndarray]:
    """The subject's gradients by name, each of the shape of what it belongs to."""
    given = (case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec)
    d_output_TD = case.d_output_TD.astype(np.float32)
    found = judge.call(case, "layer_gradients", *given, d_output_TD, **case.inputs)
    wanted = wanted_gradients(case)
    missing = wanted.keys() - found.keys()
    unknown = found.keys() - wanted.keys() - {"expert_bias_E"}
    if missing or unknown:
        accuse("gradients of other parameters", expected=", ".join(sorted(wanted)), received=", ".join(sorted(found)))  # fmt: skip
    shapes = {name: value.shape for name, value in wanted.items()}
    if case.params.expert_bias_E is not None:
        shapes["expert_bias_E"] = case.params.expert_bias_E.shape
    # Without a bias there is nothing that its gradient could have the shape of.
    return {name: _array(case, value, shapes[name], name) for name, value in found.items() if name in shapes}


def wanted_gradients(case: LayerCase) -> dict[str, np.ndarray]:
    """The reference's gradients by name, but for that of expert_bias_E."""
    grads = case.gradients.params
    named = {f.name: getattr(grads, f.name) for f in fields(LayerParams) if f.name != "expert_bias_E"}
    return {"x_TD": case.gradients.x_TD} | {
        name: np.asarray(value) for name, value in named.items() if value is not None
    }


def _array(case, value, shape, name: str = "output") -> np.ndarray:
    try:
        found = np.asarray(value).astype(np.float64)
    except (TypeError, ValueError):
        raise Violation(f"{name}: no array", expected=f"shape {shape}", received=str(type(value))) from None
    if found.shape != shape:
        accuse(f"{name} of another shape", expected=str(shape), received=str(found.shape))
    return found


# holding what returned against the reference


def hold(case, title: str, found, wanted, radius, *, rows=None, label: Callable[[int], str] | None = None):
    """Every number is within its radius of the wanted one; the first row that has another is shown.

    Args:
        rows: bools, the rows that are judged; None: all.
        label: what a row is; None: a token.
    """
    found, wanted, radius = (np.atleast_1d(each) for each in (found, wanted, radius))
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(found - wanted) <= radius)  # NaN is wrong
    wrong_R = wrong.any(axis=tuple(range(1, wrong.ndim)))
    for row in np.flatnonzero(wrong_R if rows is None else wrong_R & rows):
        token = int(row) if label is None else None
        full_title = title if label is None else f"{title}: {label(int(row))}"
        accuse(full_title, token=token, expected=shown(wanted[row]), received=shown(found[row]))


def shown(values) -> str:
    """A row of numbers, shortened."""
    flat = np.ravel(values)
    numbers = " ".join(f"{v:.6g}" for v in flat[:12])
    return f"[{numbers}{' ...' if len(flat) > 12 else ''}]"


def hold_experts(judge: Judge, case: LayerCase, rows_RD, counts_E, title: str) -> None:
    """The rows of the experts are the reference's; those past the counts are not judged."""
    found = expert_rows(judge, case, rows_RD, counts_E)
    N = int(counts_E.sum())
    wanted_ND = run_experts(rows_RD[:N], counts_E, case.params, case.spec.experts).output_RD
    owner_N = np.repeat(np.arange(len(counts_E)), counts_E)
    radius_ND = experts_radius(judge, case, rows_RD[:N], counts_E)
    hold(case, title, found[:N], wanted_ND, radius_ND, label=lambda row: f"row {row}, of expert {owner_N[row]}")


def experts_radius(judge: Judge, case: LayerCase, rows_ND, counts_E) -> np.ndarray:
    """How far rounding can take each output of the experts."""
    dtype = dtypes(judge)[1]
    ends_E = np.cumsum(counts_E)
    radii = [
        feed_forward(exact(rows_ND[end - size : end], dtype), case.params.expert(e), case.spec.experts).output_RD.radius
        for e, (end, size) in enumerate(zip(ends_E, counts_E, strict=True))
        if size
    ]
    return np.concatenate([*radii, np.zeros((0, case.spec.experts.dim))])


def combined_ball(judge: Judge, case: LayerCase, rows_ND, order_N, weights_TK) -> Ball:
    """The reference's weighted sums, and how far rounding can take them."""
    T, K = weights_TK.shape
    dtype = dtypes(judge)[1]
    slots_TKD = unpermute(rows_ND, order_N, K, T)
    ball = layer_bounds.combine(exact(slots_TKD, dtype), exact(weights_TK, dtype), case.spec.router)
    return ball.made(combine(slots_TKD, weights_TK, case.spec.router), ball.radius)


def hold_layer(judge: Judge, case: LayerCase, title: str) -> None:
    """The output is the reference's, for the tokens whose choice is beyond doubt."""
    found = output(judge, case)
    radius_TD = layer_bounds.layer(case, *dtypes(judge)).output_TD.radius
    with excusing(judge, case):
        hold(case, title, found, case.reference.output_TD, radius_TD, rows=judged_T(judge, case))


def hold_gradients(judge: Judge, case: LayerCase, names, title: str) -> None:
    """The gradients of these names are the reference's; a case with a near tie has none that could be judged."""
    found = gradients(judge, case)
    balls, wanted = layer_bounds.gradients(case, *dtypes(judge)), wanted_gradients(case)
    clear_T = judged_T(judge, case)
    with excusing(judge, case):
        for name in names:
            if name == "x_TD":
                hold(case, title, found[name], wanted[name], balls[name].radius, rows=clear_T)
            elif name in wanted and clear_T.all():
                hold_parameter(case, title, name, found[name], wanted[name], balls[name].radius)


def hold_parameter(case: LayerCase, title: str, name: str, found, wanted, radius, *, rows=None) -> None:
    """`hold` of what belongs to a parameter."""
    hold(case, title, found, wanted, radius, rows=rows, label=lambda row: f"{name}[{row}]")


@contextmanager
def excusing(judge: Judge, case: LayerCase):
    """What a wrong router makes wrong is not judged: the requirements of the router accuse it."""
    try:
        yield
    except Violation:
        if router_is_wrong(judge, case):
            raise NotRun("judged where the subject's router is right") from None
        raise


def router_is_wrong(judge: Judge, case: LayerCase) -> bool:
    """The subject's own `route` selects or weighs otherwise on this case, where it has one."""
    try:
        seen = judge.observe(case.router_case)
    except NotRun:
        return False
    except Violation:
        return True
    return bool(selection_differs(judge, seen) or weights_differ(judge, seen))


def unused_or_null(expert_ids_TK, num_experts: int) -> np.ndarray:
    """(T, K) the slots that no expert works on."""
    return (expert_ids_TK == UNUSED) | (expert_ids_TK >= num_experts)
