"""conformance, layer: layer. Tokens become tokens, end to end.

Legend: T tokens, D model dim, E experts.
"""

from contextlib import suppress
from dataclasses import fields

import numpy as np

from conformance.core.case import float32
from conformance.core.holding import hold
from conformance.core.judge import Crash, Judge, NotRun, accuse
from conformance.core.rounding import equal
from conformance.core.show import shown, spec_fields
from conformance.layer import routed
from conformance.layer.case import LayerCase
from conformance.layer.kind import requires
from conformance.layer.predicates import (
    CHOICE_IS_CLEAR,
    PARTS,
    POISON,
    WHOLE,
    by_token,
    chosen_alone,
    plainly_routed,
    poisoned,
    routed_alone,
    sees_tokens,
    takes_ids,
    tokens_choose,
    unaligned,
    unlimited,
    unlimited_and_unmasked,
    unmasked,
    without_given_weights,
)
from conformance.layer.verdicts import (
    ROUTER_IS_WRONG,
    arguments_of,
    array_of,
    hold_layer,
    hold_unchanged,
    judged_T,
    output_of_subject,
    radius_of_output,
)
from moe_ref import CapacitySpec, LayerParams, LayerSpec
from moe_ref.specs.fused import num_fused
from moe_ref.specs.invariant import CHOOSE_ALONE

ROUTED = ("LAY-2", "LAY-12", "LAY-13", "LAT-1", "LAT-3", "NUL-1")
"""What the routed experts return without shared ones."""


def weighs_outputs_alone(spec: LayerSpec) -> bool:
    """Routed experts with weights on their output, and nothing else."""
    return _routed_alone(spec) and spec.router.weight_on == "output"


def weighs_inputs_alone(spec: LayerSpec) -> bool:
    """Routed experts with weights on their input, and nothing else."""
    return _routed_alone(spec) and spec.router.weight_on == "input"


def _routed_alone(spec: LayerSpec) -> bool:
    return spec.shared is None and spec.router.num_null_experts == 0 and sees_tokens(spec)


def is_unscaled(spec: LayerSpec) -> bool:
    """Neither the weights nor the routed output are scaled."""
    return spec.router.route_scale == 1 and spec.router.output_scale == 1


def sums_shared(spec: LayerSpec) -> bool:
    """Shared experts that are summed, each with its own factor or none."""
    return spec.shared is not None and spec.shared.gate == "none" and spec.shared.combine == "sum"


def unscaled(case: LayerCase) -> LayerCase:
    """The same layer without its scales."""
    return case.with_(spec=case.spec.replace(router=case.spec.router.replace(route_scale=1.0, output_scale=1.0)))


@requires("LAY-1", method="layer")
def a_layer_runs_and_returns_one_output_for_each_token(judge, case):
    output_of_subject(judge, case)


@requires(
    "LAY-2",
    large=1,
    published=True,
    method="layer",
    spec=weighs_outputs_alone,
    x=("normal", "large"),
    after=PARTS,
    unless=(ROUTER_IS_WRONG,),
)
def the_output_is_the_weighted_sum_of_the_experts(judge, case):
    hold_layer(judge, case, "not the weighted sum of its experts")


@requires("LAY-3", method="layer", tokens=(0,), bias=("none",))
def zero_tokens_give_zero_outputs(judge, case):
    output_of_subject(judge, case)


@requires("LAY-4", method="layer", spec=by_token, tokens=(7,), after=("LAY-1",))
def a_token_depends_on_itself_alone(judge, case):
    found_TD, radius_TD = output_of_subject(judge, case), radius_of_output(judge, case)
    clear_T = judged_T(judge, case)
    order = case.rng().permutation(case.num_tokens)
    for rows in (order, order[:1]):
        other_TD = output_of_subject(judge, case.tokens(rows))
        wrong_T = ~(np.abs(other_TD - found_TD[rows]) <= 2 * radius_TD[rows]).all(axis=-1) & clear_T[rows]
        for place in np.flatnonzero(wrong_T):
            token = int(rows[place])
            title = f"another output among tokens {rows.tolist()} than in the whole batch"
            wanted = np.zeros_like(found_TD)
            wanted[token] = other_TD[place]
            hold(title, found_TD, wanted, 2 * radius_TD, rows=np.arange(case.num_tokens) == token)


@requires("LAY-5", method="layer", spec=by_token, tokens=(7,), after=("LAY-1",))
def a_nan_stays_in_its_token(judge, case):
    rng, D = case.rng(), case.spec.experts.dim
    token = int(rng.integers(case.num_tokens))
    others, clear_T = np.arange(case.num_tokens) != token, judged_T(judge, case)
    clean_TD = output_of_subject(judge, case)
    for what, columns_D in (("a NaN in", np.arange(D) == rng.integers(D)), ("all NaN in", np.full(D, True))):
        spoiled_TD = np.where(others[:, None] | ~columns_D, case.x_TD, np.nan)
        try:
            found_TD = output_of_subject(judge, case.with_(x_TD=spoiled_TD))
        except Crash as crash:
            if crash.refused:
                continue
            raise
        title = f"changed by {what} token {token}"
        hold(title, found_TD, clean_TD, 2 * radius_of_output(judge, case), rows=others & clear_T)


@requires("LAY-6", method="layer", inputs=("token_mask_T",), tokens=(7,), after=("LAY-1",))
def the_output_of_padding_is_0(judge, case):
    for poison in POISON:
        found_TD = output_of_subject(judge, poisoned(case, poison))
        nothing = np.zeros(found_TD.shape)
        hold(f"padding that holds {poison:g} has an output", found_TD, nothing, rows=~case.valid_T)


@requires(
    "LAY-7",
    large=3,
    method="layer",
    spec=chosen_alone,
    inputs=("token_mask_T",),
    tokens=(7,),
    after=("LAY-1",),
    simpler=((unmasked, ("LAY-1",)),),
)
def padding_changes_no_other_token(judge, case):
    plain_TD = output_of_subject(judge, unmasked(case))
    clear_T = judged_T(judge, case) & case.valid_T
    for poison in POISON:
        found_TD = output_of_subject(judge, poisoned(case, poison))
        title = f"changed by padding that holds {poison:g}"
        hold(title, found_TD, plain_TD, 2 * radius_of_output(judge, case), rows=clear_T)


@requires(
    "LAY-8",
    large=1,
    method="layer",
    spec=lambda s: sums_shared(s) and is_unscaled(s),
    after=(*PARTS, "LAT-2"),
    simpler=((routed_alone, ROUTED),),
    unless=(ROUTER_IS_WRONG,),
)
def a_shared_expert_adds_its_output_once(judge, case):
    hold_layer(judge, case, "not routed + shared")


@requires(
    "LAY-9",
    method="layer",
    spec=lambda s: sums_shared(s) and not is_unscaled(s) and sees_tokens(s),
    after=PARTS,
    simpler=((routed_alone, ROUTED), (unscaled, ("LAY-8",))),
    unless=(ROUTER_IS_WRONG,),
)
def the_shared_output_is_not_scaled(judge, case):
    scales = f"route_scale {case.spec.router.route_scale:g}, output_scale {case.spec.router.output_scale:g}"
    hold_layer(judge, case, f"not routed + shared with {scales}")


@requires(
    "LAY-10",
    method="layer",
    spec=lambda s: s.shared is not None and s.shared.gate == "sigmoid" and sees_tokens(s),
    after=PARTS,
    simpler=((routed_alone, ROUTED),),
    unless=(ROUTER_IS_WRONG,),
)
def the_shared_gate_multiplies_the_shared_output(judge, case):
    hold_layer(judge, case, "not routed + sigmoid(logit) * shared")


@requires(
    "LAY-11",
    method="layer",
    spec=lambda s: s.shared is not None and s.shared.combine == "average" and sees_tokens(s),
    after=PARTS,
    simpler=((routed_alone, ROUTED),),
    unless=(ROUTER_IS_WRONG,),
)
def an_average_is_half_the_sum(judge, case):
    hold_layer(judge, case, "not (routed + shared) / 2")


@requires(
    "LAY-12",
    method="layer",
    spec=weighs_inputs_alone,
    x=("normal", "large"),
    after=PARTS,
    unless=(ROUTER_IS_WRONG,),
)
def a_weight_on_the_input_is_there_alone(judge, case):
    hold_layer(judge, case, "not the sum of expert(weight * x)")


@requires(
    "LAY-13",
    method="layer",
    spec=lambda s: s.router.num_null_experts > 0 and s.router.num_constant_experts == 0 and sees_tokens(s),
    after=PARTS,
    unless=(ROUTER_IS_WRONG,),
)
def a_null_expert_adds_its_token_or_nothing(judge, case):
    hold_layer(judge, case, f"not with null experts of kind {case.spec.router.null_kind}")


@requires("LAY-14", method="layer", spec=weighs_outputs_alone, after=("LAY-1",))
def the_output_doubles_with_the_down_projections(judge, case):
    names = [name for name in ("w_down_EFD", "b_down_ED") if getattr(case.params, name) is not None]
    doubled = case.with_params(**{name: 2 * getattr(case.params, name) for name in names})
    found_TD, twice_TD = output_of_subject(judge, case), output_of_subject(judge, doubled)
    clear_T = judged_T(judge, case)
    title = "not doubled with the down projections"
    hold(title, twice_TD, 2 * found_TD, 4 * radius_of_output(judge, case), rows=clear_T)


@requires(
    "LAY-15",
    method="layer",
    spec=lambda s: s.router.num_expert_groups is None and s.router.selector == "top_k",
    after=("LAY-1",),
)
def renamed_experts_give_the_same_output(judge, case):
    E = case.spec.router.num_experts
    names_E = case.rng().permutation(E)
    changes = {}
    for field in fields(LayerParams):
        value = getattr(case.params, field.name)
        # The arrays of the experts, and the first columns of the gate; null and shared columns stay where they are.
        if value is not None and value.ndim and not field.name.startswith(("shared_", "latent_", "constant_")):
            changes[field.name] = np.concatenate([value[names_E], value[E:]])
    renamed = case.with_params(**changes)
    found_TD, other_TD = output_of_subject(judge, case), output_of_subject(judge, renamed)
    clear_T = judged_T(judge, case)
    title = f"changed by experts in the order {names_E.tolist()}"
    hold(title, other_TD, found_TD, 2 * radius_of_output(judge, case), rows=clear_T)


@requires("LAY-16", method="layer", tokens=(7,), after=("LAY-1",))
def the_same_input_gives_the_same_output(judge, case):
    first_TD, second_TD = (output_of_subject(judge, case) for _ in range(2))
    if np.isnan(first_TD).any():
        raise NotRun("judged where the output is a number")
    hold("another output in a second call", second_TD, first_TD)


@requires("LAY-28", method="layer", tokens=(7,), after=("LAY-1", "LAY-16"))
def what_a_layer_returned_stays(judge, case):
    returned = judge.call(case, "layer", *arguments_of(case), **case.inputs)
    first_TD = array_of(returned, case.x_TD.shape).copy()
    output_of_subject(judge, case.with_(x_TD=-case.x_TD))
    later_TD = array_of(returned, case.x_TD.shape)
    for t in np.flatnonzero(~equal(first_TD, later_TD).all(axis=-1)):
        title = "the output is another after the next call"
        accuse(title, token=int(t), expected=shown(first_TD[t]), received=shown(later_TD[t]))


@requires(
    "LAY-17",
    method="layer",
    routed=True,
    after=("LAY-1",),
    simpler=((plainly_routed, (*PARTS, *WHOLE)),),
    unless=(ROUTER_IS_WRONG,),
)
def a_layer_routes_as_its_router_says(judge, case):
    found_TD, wanted_TD = output_of_subject(judge, case), case.reference.output_TD
    # A choice, and a weight of a tiny score, may hang on rounding; that the output is a number may not.
    free_T = routed.may_be_no_number_T(case, judge.subject.compute_dtype)
    for token in np.flatnonzero(~np.isfinite(found_TD).all(axis=-1) & ~free_T):
        accuse("not a number", token=int(token), expected=shown(wanted_TD[token]), received=shown(found_TD[token]))
    clear_T = routed.clear_T(case, judge.subject.compute_dtype)
    judge.near_ties(int((~clear_T).sum()))
    title = "not the weighted sum of the experts that its logits choose"
    hold(title, found_TD, wanted_TD, radius_of_output(judge, case), rows=clear_T)


NOTHING_EXCEEDS = (CapacitySpec(slots=2**20), CapacitySpec(factor=1024.0))


@requires("LAY-18", method="layer", spec=tokens_choose, tokens=(7,), after=("LAY-1", "LAY-16"), few=True)
def a_capacity_that_nothing_exceeds_changes_nothing(judge, case):
    plain_TD = output_of_subject(judge, case)
    for capacity in NOTHING_EXCEEDS[: 1 if judge.subject.compiles else None]:
        limited_TD = output_of_subject(judge, case.with_inputs(capacity=capacity))
        hold(f"changed by a capacity of {spec_fields(capacity)}", limited_TD, plain_TD)


@requires(
    "LAY-19",
    large=3,
    method="layer",
    spec=tokens_choose,
    inputs=("capacity",),
    tokens=(7, 17),
    after=PARTS,
    simpler=((unlimited, WHOLE), (unlimited_and_unmasked, WHOLE)),
    unless=(ROUTER_IS_WRONG,),
    few=True,
)
def a_dropped_slot_adds_nothing(judge, case):
    hold_layer(judge, case, f"not with a capacity of {spec_fields(case.inputs['capacity'])}")


@requires(
    "LAY-20",
    method="layer",
    spec=takes_ids,
    inputs=("given_weights_TK",),
    after=PARTS,
    simpler=((without_given_weights, WHOLE),),
    few=True,
)
def given_weights_are_taken_as_they_are(judge, case):
    hold_layer(judge, case, "not the given weights")


@requires(
    "LAY-21",
    method="layer",
    inputs=("token_mask_T",),
    tokens=(7,),
    after=("LAY-1",),
    simpler=((unmasked, ("LAY-1",)),),
)
def a_layer_changes_no_array_that_it_is_given(judge, case):
    hold_unchanged(judge, unmasked(case), "layer", arguments_of(case))
    with suppress(NotRun):  # of a subject that takes no mask
        hold_unchanged(judge, case, "layer", arguments_of(case))


@requires(
    "LAY-22",
    method="layer",
    inputs=("align",),
    tokens=(7, 17),
    after=PARTS,
    simpler=((unaligned, WHOLE),),
    unless=(ROUTER_IS_WRONG,),
    few=True,
)
def aligned_rows_change_no_output(judge, case):
    hold_layer(judge, case, f"not with {spec_fields(case.inputs['align'])}")


def chooses_alone(spec: LayerSpec) -> bool:
    """Selectors that look at the token alone, not at its place, and draw nothing."""
    return spec.router.selector in CHOOSE_ALONE and by_token(spec)


def invariant_output(judge: Judge, case: LayerCase) -> np.ndarray:
    """The subject's (T, D) output in its batch-invariant mode."""
    found = judge.call(case, "layer", *arguments_of(case), batch_invariant=True, **case.inputs)
    return array_of(found, case.x_TD.shape)


@requires("LAY-23", method="layer", spec=chooses_alone, tokens=(11,), after=("LAY-1", "LAY-16"), few=True)
def a_token_has_the_same_bits_in_any_batch(judge, case):
    rng, T = case.rng(), case.num_tokens
    whole_TD = invariant_output(judge, case)

    def hold_tokens(rows: np.ndarray, found_TD: np.ndarray, title: str) -> None:
        hold(title, found_TD, whole_TD[rows], label=lambda row: f"token {rows[row]}")

    order = rng.permutation(T)
    hold_tokens(order, invariant_output(judge, case.tokens(order)), f"another output in the order {order.tolist()}")
    token = int(rng.integers(T))
    others_T1 = np.arange(T)[:, None] != token
    changed = case.with_(x_TD=np.where(others_T1, float32(3 * rng.normal(size=case.x_TD.shape)), case.x_TD))
    found_TD = invariant_output(judge, changed)[[token]]
    hold_tokens(np.array([token]), found_TD, "another output beside other tokens")
    # A number of tokens is a program of its own for a subject that compiles.
    for size in (1,) if judge.subject.compiles else (1, T // 2 + 1):
        rows = np.sort(rng.permutation(T)[:size])
        hold_tokens(rows, invariant_output(judge, case.tokens(rows)), f"another output in a batch of {size}, not {T}")


@requires(
    "LAY-24",
    method="layer",
    spec=chooses_alone,
    tokens=(11,),
    after=(*PARTS, *WHOLE),
    unless=(ROUTER_IS_WRONG,),
    few=True,
)
def the_batch_invariant_output_is_the_layers(judge, case):
    found_TD, radius_TD = invariant_output(judge, case), radius_of_output(judge, case)
    title = "not the layer's with batch_invariant"
    hold(title, found_TD, case.reference.output_TD, radius_TD, rows=judged_T(judge, case))


def fuses(spec: LayerSpec) -> bool:
    """Layers whose shared experts fit among the routed ones."""
    try:
        return num_fused(spec) > 0
    except ValueError:
        return False


def fused_by_subject(judge, case: LayerCase) -> tuple[np.ndarray, np.ndarray]:
    """The subject's (T, D) output and (E,) counts of the fused form."""
    output_TD, counts_E = judge.call(case, "fused_layer", *arguments_of(case), **case.inputs)
    return array_of(output_TD, case.x_TD.shape), np.asarray(counts_E)


@requires("LAY-25", method="fused_layer", spec=fuses, tokens=(7,))
def fused_shared_experts_give_the_same_output(judge, case):
    found_TD, _ = fused_by_subject(judge, case)
    # The slots of shared experts are rounded as routed ones are: once for the weight, once for the sum.
    radius_TD = 2 * radius_of_output(judge, case)
    hold("another output in the fused form", found_TD, case.reference.output_TD, radius_TD, rows=judged_T(judge, case))


@requires("LAY-26", method="fused_layer", spec=fuses, tokens=(7,), given=(CHOICE_IS_CLEAR,))
def fused_counts_are_of_routed_experts(judge, case):
    _, counts_E = fused_by_subject(judge, case)
    wanted_E = case.reference.permutation.tokens_per_expert_E
    if counts_E.shape != wanted_E.shape or (counts_E != wanted_E).any():
        accuse("other counts in the fused form", expected=str(wanted_E.tolist()), received=str(counts_E.tolist()))
