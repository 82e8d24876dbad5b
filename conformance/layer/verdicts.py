"""conformance, layer: what a subject returns for a case, checked for its form, and held against the reference.

An error, and a result of another form, violate the requirement of the check that runs.

Legend: T tokens, K top_k, D model dim, E experts, N used slots, R rows, used ones first.
"""

from collections.abc import Iterable

import numpy as np

from conformance.core.check import Condition
from conformance.core.holding import array_from, hold
from conformance.core.judge import Judge, NotRun, Violation, accuse
from conformance.core.show import shown
from conformance.layer import bounds
from conformance.layer.balls import Ball, exact, feed_forward, narrower
from conformance.layer.case import LayerCase
from conformance.router.observation import observe
from conformance.router.verdicts import selection_differs, weights_differ
from moe_ref import UNUSED, AlignSpec, LayerParams
from moe_ref.experts import combine, run_experts
from moe_ref.permute import unpermute


def dtypes(judge: Judge) -> tuple[str, str]:
    """The dtype in which the subject computes, and that of its experts, which is no wider."""
    return judge.subject.compute_dtype, narrower(judge.subject.compute_dtype, judge.subject.expert_dtype)


def judged_T(judge: Judge, case: LayerCase) -> np.ndarray:
    """(T,) the tokens whose choice of experts is beyond doubt; the others are counted as near ties."""
    clear_T = bounds.stable_T(case, judge.subject.compute_dtype)
    judge.near_ties(int((~clear_T).sum()))
    return clear_T


# calling a subject


def permutation_of_subject(
    judge: Judge, case: LayerCase, expert_ids_TK: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The subject's order (N,) and counts (E,), as int64."""
    returned = judge.call(case, "permute", expert_ids_TK.copy(), num_experts)
    order_N, counts_E = integers_of(returned, ("order", "counts"))
    if len(counts_E) != num_experts:
        accuse("counts of another length", expected=num_experts, received=len(counts_E))
    return order_N, counts_E


def aligned_of_subject(
    judge: Judge, case: LayerCase, expert_ids_TK: np.ndarray, num_experts: int, align: AlignSpec
) -> tuple[np.ndarray, np.ndarray]:
    """The subject's slots of aligned rows (A,), -1 where there is none, and multiples (E,), as int64."""
    returned = judge.call(case, "align", expert_ids_TK.copy(), num_experts, align)
    slot_of_row_A, aligned_E = integers_of(returned, ("slots", "counts"))
    if len(aligned_E) != num_experts:
        accuse("counts of another length", expected=num_experts, received=len(aligned_E))
    if len(slot_of_row_A) < aligned_E.sum():
        accuse("fewer rows than the counts say", expected=int(aligned_E.sum()), received=len(slot_of_row_A))
    is_slot_A = (slot_of_row_A >= 0) & (slot_of_row_A < expert_ids_TK.size)
    return np.where(is_slot_A, slot_of_row_A, UNUSED), aligned_E


def integers_of(returned: object, names: tuple[str, str]) -> list[np.ndarray]:
    """Two arrays of integers, of one axis, as int64."""
    try:
        pair = (*returned,)  # type: ignore[misc]
    except TypeError:
        pair = ()
    if len(pair) != 2:
        accuse("not two arrays", expected=f"({', '.join(names)})", received=returned)
    one, other = (array_from(each, f"the {name}: no array") for name, each in zip(names, pair, strict=True))
    for name, found in zip(names, (one, other), strict=True):
        if found.dtype.kind not in "iu" or found.ndim != 1:
            received = f"{found.dtype}{list(found.shape)}"
            accuse(f"the {name} are not integers of one axis", expected="integers", received=received)
    return [one.astype(np.int64), other.astype(np.int64)]


def rows_of_subject(judge: Judge, case: LayerCase, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray) -> np.ndarray:
    """The subject's (R, D) outputs of rows sorted by expert."""
    given = (rows_RD.astype(np.float32), tokens_per_expert_E.copy(), case.params.astype(np.float32), case.spec)
    return array_of(judge.call(case, "experts", *given), rows_RD.shape)


def sums_of_subject(
    judge: Judge, case: LayerCase, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray
) -> np.ndarray:
    """The subject's (T, D) weighted sums."""
    given = (rows_ND.astype(np.float32), order_N.copy(), weights_TK.astype(np.float32), case.spec)
    return array_of(judge.call(case, "combine", *given), (len(weights_TK), case.spec.routed_experts.dim))


def arguments_of(case: LayerCase) -> tuple:
    """The first arguments of a layer, in the dtype of a subject, each with its own memory."""
    return case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec


def hold_unchanged(judge: Judge, case: LayerCase, method: str, arguments: tuple) -> None:
    """A method leaves the arrays that it is given as they are. The arrays are writable."""
    given = {f"argument {number}": value for number, value in enumerate(arguments) if isinstance(value, np.ndarray)}
    for params in (value for value in arguments if isinstance(value, LayerParams)):
        given |= params.by_name()
    before = {name: value.copy() for name, value in given.items()}
    judge.call(case, method, *arguments, **case.inputs)
    for name, value in given.items():
        if not np.array_equal(value, before[name], equal_nan=True):
            accuse(f"{name} is another after the call", expected=shown(before[name]), received=shown(value))


def output_of_subject(judge: Judge, case: LayerCase) -> np.ndarray:
    """The subject's (T, D) output of the whole layer."""
    return array_of(judge.call(case, "layer", *arguments_of(case), **case.inputs), case.x_TD.shape)


def gradients_of_subject(judge: Judge, case: LayerCase) -> dict[str, np.ndarray]:
    """The subject's gradients by name, each of the shape of what it belongs to."""
    d_output_TD = case.d_output_TD.astype(np.float32)
    found = judge.call(case, "layer_gradients", *arguments_of(case), d_output_TD, **case.inputs)
    wanted = wanted_gradients(case)
    missing = wanted.keys() - found.keys()
    unknown = found.keys() - wanted.keys() - {"expert_bias_E"}
    if missing or unknown:
        names = (", ".join(sorted(each)) for each in (wanted, found))
        accuse("gradients of other parameters", **dict(zip(("expected", "received"), names, strict=True)))
    shapes = {name: value.shape for name, value in wanted.items()}
    if case.params.expert_bias_E is not None:
        shapes["expert_bias_E"] = case.params.expert_bias_E.shape
    # Without a bias there is nothing that its gradient could have the shape of.
    return {name: array_of(value, shapes[name], name) for name, value in found.items() if name in shapes}


def wanted_gradients(case: LayerCase) -> dict[str, np.ndarray]:
    """The reference's gradients by name, but for that of expert_bias_E."""
    named = case.gradients.params.by_name().items()
    return {"x_TD": case.gradients.x_TD} | {n: np.asarray(value) for n, value in named if n != "expert_bias_E"}


def array_of(value: object, shape: tuple[int, ...], name: str = "output") -> np.ndarray:
    """What a subject returned, in float64; a Violation where it is no array of this shape."""
    found = array_from(value, f"{name}: no array", expected=f"shape {shape}").astype(np.float64)
    if found.shape != shape:
        accuse(f"{name} of another shape", expected=shape, received=found.shape)
    return found


# holding what returned against the reference


def hold_experts(judge: Judge, case: LayerCase, rows_RD: np.ndarray, counts_E: np.ndarray, title: str) -> None:
    """The rows of the experts are the reference's; those past the counts are not judged."""
    found_RD, N = rows_of_subject(judge, case, rows_RD, counts_E), int(counts_E.sum())
    wanted_ND = run_experts(rows_RD[:N], counts_E, case.params, case.spec.experts).output_RD
    owner_N = np.repeat(np.arange(len(counts_E)), counts_E)
    radius_ND = radius_of_experts(judge, case, rows_RD[:N], counts_E)
    hold(title, found_RD[:N], wanted_ND, radius_ND, label=lambda row: f"row {row}, of expert {owner_N[row]}")


def radius_of_experts(judge: Judge, case: LayerCase, rows_ND: np.ndarray, counts_E: np.ndarray) -> np.ndarray:
    """(N, D) how far rounding can take each output of the experts."""
    dtype = dtypes(judge)[1]
    ends_E = np.cumsum(counts_E)
    radii = [
        feed_forward(exact(rows_ND[end - size : end], dtype), case.params.expert(e), case.spec.experts).output_RD.radius
        for e, (end, size) in enumerate(zip(ends_E, counts_E, strict=True))
        if size
    ]
    return np.concatenate([*radii, np.zeros((0, case.spec.routed_experts.dim))])


def sums_ball(judge: Judge, case: LayerCase, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray) -> Ball:
    """The reference's (T, D) weighted sums, and how far rounding can take them."""
    T, K = weights_TK.shape
    dtype = dtypes(judge)[1]
    slots_TKD = unpermute(rows_ND, order_N, K, T)
    ball = bounds.combine(exact(slots_TKD, dtype), exact(weights_TK, dtype), case.spec.router)
    return ball.made(combine(slots_TKD, weights_TK, case.spec.router), ball.radius)


def radius_of_output(judge: Judge, case: LayerCase) -> np.ndarray:
    """(T, D) how far rounding can take the output."""
    return bounds.layer(case, *dtypes(judge)).output_TD.radius


def hold_layer(judge: Judge, case: LayerCase, title: str) -> None:
    """The output is the reference's, for the tokens whose choice is beyond doubt."""
    found_TD, radius_TD = output_of_subject(judge, case), radius_of_output(judge, case)
    hold(title, found_TD, case.reference.output_TD, radius_TD, rows=judged_T(judge, case))


def hold_gradients(judge: Judge, case: LayerCase, names: Iterable[str], title: str) -> None:
    """The gradients of these names are the reference's; a case with a near tie has none that could be judged."""
    found, wanted = gradients_of_subject(judge, case), wanted_gradients(case)
    balls, clear_T = bounds.gradients(case, *dtypes(judge)), judged_T(judge, case)
    for name in names:
        if name == "x_TD":
            hold(title, found[name], wanted[name], balls[name].radius, rows=clear_T)
        elif name in wanted and clear_T.all():
            hold_parameter(title, name, found[name], wanted[name], balls[name].radius)


def hold_parameter(
    title: str,
    name: str,
    found: np.ndarray,
    wanted: np.ndarray,
    radius: np.ndarray | float = 0.0,
    *,
    rows: np.ndarray | None = None,
) -> None:
    """`hold` of what belongs to a parameter, whose rows are named after it."""
    hold(title, found, wanted, radius, rows=rows, label=lambda row: f"{name}[{row}]")


# what explains a violation


def router_is_wrong(judge: Judge, case: LayerCase) -> bool:
    """The subject's own `route` selects or weighs otherwise on this case, where it has one."""
    try:
        seen = observe(judge, case.router_case)
    except NotRun:
        return False
    except Violation:
        return True
    return bool(selection_differs(judge, seen) or weights_differ(judge, seen))


ROUTER_IS_WRONG = Condition(sentence="judged where the subject's router is right", holds=router_is_wrong)
"""What a wrong router makes wrong is not judged: the requirements of the router accuse it."""
