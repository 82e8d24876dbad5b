"""conformance, suite: layer. Tokens become tokens, end to end."""

from dataclasses import fields, replace

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer import bounds as layer_bounds
from conformance.layer.verdicts import blaming, dtypes, hold, hold_layer, judged_T, output
from moe_ref import LayerParams

STAGES = ("EXP-2", "EXP-3", "EXP-4", "EXP-5", "CMB-2", "CMB-3", "CMB-5", "CMB-7", "LAY-1")
"""Where one of these fails on the same case, the layer fails too, and is not the one to blame."""
POISON = (np.nan, 1e30, np.nan)
"""What rows hold that nobody reads, in calls one after the other."""


def routed_alone(spec) -> bool:
    """Routed experts with weights on their output, and nothing else."""
    return spec.shared is None and spec.router.weight_on == "output" and spec.router.num_null_experts == 0


def unscaled(spec) -> bool:
    return spec.router.route_scale == 1 and spec.router.output_scale == 1


def by_token(spec) -> bool:
    """Selectors that look at the token alone, not at its place."""
    return spec.router.selector != "round_robin"


def has_shared(spec) -> bool:
    """Shared experts that are summed, each with its own factor or none."""
    return spec.shared is not None and spec.shared.gate == "none" and spec.shared.combine == "sum"


def without_shared(case):
    """The same layer without its shared experts."""
    names = (f.name for f in fields(LayerParams) if f.name.startswith("shared_"))
    return case.with_(spec=case.spec.replace(shared=None), params=replace(case.params, **dict.fromkeys(names)))


def routed_is_wrong(judge, case) -> bool:
    """Without shared experts the output is wrong already, where the subject can do without them."""
    if case.spec.router.num_scored_shared_experts or case.spec.shared is None:
        return False
    alone = without_shared(case)
    return judge.subject.supports_layer(alone.spec) is None and not judge.holds("LAY-2", alone)


def radius_of(judge, case) -> np.ndarray:
    """(T, D) how far rounding can take the output."""
    return layer_bounds.layer(case, *dtypes(judge)).output_TD.radius


def unmasked(case):
    """The same tokens, none of them padding."""
    return case.with_(inputs={name: value for name, value in case.inputs.items() if name != "token_mask_T"})


def poisoned(case, poison: float):
    """The same with this in every padding row."""
    return case.with_(x_TD=np.where(case.valid_T[:, None], case.x_TD, poison))


@requires("LAY-1", method="layer")
def test_a_layer_runs_and_returns_one_output_for_each_token(judge, case):
    output(judge, case)


@requires("LAY-2", method="layer", spec=routed_alone, x=("normal", "large"), after=STAGES)
def test_the_output_is_the_weighted_sum_of_the_experts(judge, case):
    hold_layer(judge, case, "not the weighted sum of its experts")


@requires("LAY-3", method="layer", tokens=(0,), bias=("none",))
def test_zero_tokens_give_zero_outputs(judge, case):
    output(judge, case)


@requires("LAY-4", method="layer", spec=by_token, tokens=(7,), after=("LAY-1",))
def test_a_token_depends_on_itself_alone(judge, case):
    found_TD, radius_TD = output(judge, case), radius_of(judge, case)
    clear_T = judged_T(judge, case)
    order = case.rng().permutation(case.num_tokens)
    for rows in (order, order[:1]):
        other_TD = output(judge, case.tokens(rows))
        wrong_T = ~(np.abs(other_TD - found_TD[rows]) <= 2 * radius_TD[rows]).all(axis=-1) & clear_T[rows]
        for place in np.flatnonzero(wrong_T):
            token = int(rows[place])
            title = f"another output among tokens {rows.tolist()} than in the whole batch"
            wanted = np.zeros_like(found_TD)
            wanted[token] = other_TD[place]
            hold(case, title, found_TD, wanted, 2 * radius_TD, rows=np.arange(case.num_tokens) == token)


@requires("LAY-5", method="layer", spec=by_token, tokens=(7,), after=("LAY-1",))
def test_a_nan_stays_in_its_token(judge, case):
    rng = case.rng()
    token, columns_D = int(rng.integers(case.num_tokens)), rng.random(case.spec.experts.dim) < rng.choice([0.3, 1.0])
    others = np.arange(case.num_tokens) != token
    spoiled_TD = np.where(others[:, None] | ~columns_D, case.x_TD, np.nan)
    clean_TD = output(judge, case)
    try:
        found_TD = output(judge, case.with_(x_TD=spoiled_TD))
    except Violation as violation:
        if violation.received.startswith("ValueError"):
            return  # refused
        raise
    clear_T = judged_T(judge, case)
    title = f"changed by a NaN in token {token}"
    hold(case, title, found_TD, clean_TD, 2 * radius_of(judge, case), rows=others & clear_T)


@requires("LAY-6", method="layer", inputs=("token_mask_T",), tokens=(7,), after=("LAY-1",))
def test_the_output_of_padding_is_0(judge, case):
    for poison in POISON:
        found_TD = output(judge, poisoned(case, poison))
        nothing = np.zeros(found_TD.shape)
        hold(case, f"padding that holds {poison:g} has an output", found_TD, nothing, nothing,
             rows=~case.valid_T)  # fmt: skip


@requires("LAY-7", method="layer", inputs=("token_mask_T",), tokens=(7,), after=("LAY-1",))
def test_padding_changes_no_other_token(judge, case):
    plain_TD = output(judge, unmasked(case))
    clear_T = judged_T(judge, case) & case.valid_T
    for poison in POISON:
        found_TD = output(judge, poisoned(case, poison))
        title = f"changed by padding that holds {poison:g}"
        hold(case, title, found_TD, plain_TD, 2 * radius_of(judge, case), rows=clear_T)


@requires("LAY-8", method="layer", spec=lambda s: has_shared(s) and unscaled(s), after=(*STAGES, "LAY-2"))
def test_a_shared_expert_adds_its_output_once(judge, case):
    if not routed_is_wrong(judge, case):
        hold_layer(judge, case, "not routed + shared")


@requires("LAY-9", method="layer", spec=lambda s: has_shared(s) and not unscaled(s), after=(*STAGES, "LAY-8"))
def test_the_shared_output_is_not_scaled(judge, case):
    if not routed_is_wrong(judge, case):
        scales = f"route_scale {case.spec.router.route_scale:g}, output_scale {case.spec.router.output_scale:g}"
        hold_layer(judge, case, f"not routed + shared with {scales}")


@requires("LAY-10", method="layer", spec=lambda s: s.shared is not None and s.shared.gate == "sigmoid", after=STAGES)
def test_the_shared_gate_multiplies_the_shared_output(judge, case):
    if not routed_is_wrong(judge, case):
        hold_layer(judge, case, "not routed + sigmoid(logit) * shared")


@requires("LAY-11", method="layer", spec=lambda s: s.shared is not None and s.shared.combine == "average", after=STAGES)
def test_an_average_is_half_the_sum(judge, case):
    if not routed_is_wrong(judge, case):
        hold_layer(judge, case, "not (routed + shared) / 2")


def on_input(spec) -> bool:
    return spec.router.weight_on == "input" and spec.shared is None and spec.router.num_null_experts == 0


@requires("LAY-12", method="layer", spec=on_input, x=("normal", "large"), after=STAGES)
def test_a_weight_on_the_input_is_there_alone(judge, case):
    hold_layer(judge, case, "not the sum of expert(weight * x)")


@requires("LAY-13", method="layer", spec=lambda s: s.router.num_null_experts > 0, after=STAGES)
def test_a_null_expert_adds_its_token_or_nothing(judge, case):
    hold_layer(judge, case, f"not with null experts of kind {case.spec.router.null_kind}")


@requires("LAY-14", method="layer", spec=routed_alone, after=("LAY-1",))
def test_the_output_doubles_with_the_down_projections(judge, case):
    names = [name for name in ("w_down_EFD", "b_down_ED") if getattr(case.params, name) is not None]
    doubled = case.with_params(**{name: 2 * getattr(case.params, name) for name in names})
    found_TD, twice_TD = output(judge, case), output(judge, doubled)
    clear_T = judged_T(judge, case)
    title = "not doubled with the down projections"
    hold(case, title, twice_TD, 2 * found_TD, 4 * radius_of(judge, case), rows=clear_T)


@requires(
    "LAY-15",
    method="layer",
    spec=lambda s: s.router.num_expert_groups is None and s.router.selector == "top_k",
    after=("LAY-1",),
)
def test_renamed_experts_give_the_same_output(judge, case):
    E = case.spec.router.num_experts
    names_E = case.rng().permutation(E)
    changes = {}
    for field in fields(LayerParams):
        value = getattr(case.params, field.name)
        # The arrays of the experts, and the first columns of the gate; null and shared columns stay where they are.
        if value is not None and value.ndim and not field.name.startswith("shared_"):
            changes[field.name] = np.concatenate([value[names_E], value[E:]])
    renamed = case.with_params(**changes)
    found_TD, other_TD = output(judge, case), output(judge, renamed)
    clear_T = judged_T(judge, case)
    title = f"changed by experts in the order {names_E.tolist()}"
    hold(case, title, other_TD, found_TD, 2 * radius_of(judge, case), rows=clear_T)


@requires("LAY-16", method="layer", tokens=(7,), after=("LAY-1",))
def test_the_same_input_gives_the_same_output(judge, case):
    first_TD, second_TD = (output(judge, case) for _ in range(2))
    if np.isnan(first_TD).any():
        raise NotRun("judged where the output is a number")
    nothing = np.zeros(first_TD.shape)
    hold(case, "another output in a second call", second_TD, first_TD, nothing)
