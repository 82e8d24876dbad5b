"""moe_jax, tests of routing: every stage equals moe_ref, in value and in gradient."""

import jax
import ml_dtypes
import numpy as np
import pytest

import moe_ref
from conformance.subjects.jax.subject import Jax
from moe_jax import routing
from moe_jax.top_k import top_k
from moe_ref import UNUSED, RouterInputs, RouterSpec

SIGMOID, NORM = {"score_func": "sigmoid"}, {"route_norm": True}
SELECTED = {"score_over": "selected", "select_by": "logit"}
GROUPS = {"num_experts": 12, "top_k": 3, "num_expert_groups": 4, "num_limited_groups": 2, **SIGMOID}
SPECS = {
    "softmax": {},
    "sigmoid, norm, scale": SIGMOID | NORM | {"norm_eps": 1e-20, "route_scale": 2.5},
    "sqrtsoftplus": {"score_func": "sqrtsoftplus"} | NORM,
    "selected": SELECTED,
    "by logit": SIGMOID | {"select_by": "logit"},
    "scaled, capped": NORM | {"logit_scale": 2.0, "logit_softcap": 1.5},
    "clamp": NORM | {"norm_form": "clamp", "norm_eps": 0.5},
    "norm of order 2": NORM | {"norm_p": 2.0, "norm_eps": 0.1},
    "norm of order one half": SIGMOID | NORM | {"norm_p": 0.5},
    "per_expert": NORM | {"learned_scale": "per_expert"},
    "global, shared in norm": SIGMOID
    | NORM
    | {"learned_scale": "global", "num_scored_shared_experts": 2, "norm_with_shared": True, "route_scale": 1.5},
    "shared": SIGMOID | NORM | {"num_scored_shared_experts": 2},
    "null, identity": {"num_null_experts": 3},
    "null, zero": NORM | {"num_null_experts": 3, "num_zero_experts": 2},
    "null, skip": NORM | {"num_null_experts": 3, "null_kind": "skip"},
    "all experts": {"num_experts": 8, "top_k": 8},
    "one": NORM | {"top_k": 1},
    "groups": GROUPS | NORM,
    "groups, best of three": GROUPS | {"group_score_k": 3},
    "groups, best of one": GROUPS | {"group_score_k": 1, "score_func": "softmax"},
    "groups, filled with 0": GROUPS | {"num_limited_groups": 1, "mask_fill": 0.0},
    "groups, masked scores": GROUPS | {"num_limited_groups": 1, "mask_fill": 0.0, "weights_from": "masked_scores"},
    "groups, selected": GROUPS | SELECTED | {"score_func": "softmax"},
    "wide": SIGMOID | NORM | {"num_experts": 512, "top_k": 4},
    "wide groups": GROUPS | NORM | {"num_experts": 256, "top_k": 4, "num_expert_groups": 8, "num_limited_groups": 4},
    "many": {"num_experts": 40, "top_k": 20},
    "quotas": NORM | {"num_experts": 8, "top_k": 4, "selector": "group_top_k", "quota_groups": 2},
    "relu": {"num_experts": 8, "top_k": 8, "score_func": "relu", "selector": "threshold"},
    "threshold": SIGMOID | NORM | {"top_k": 4, "selector": "threshold", "threshold": 0.5},
    "top_p": NORM | {"top_k": 5, "selector": "top_p", "top_p": 0.7},
    "table": SIGMOID | NORM | {"selector": "table"},
    "given": SIGMOID | NORM | {"selector": "given"},
    "given, selected": SELECTED | {"selector": "given"},
    "round robin": SIGMOID | {"selector": "round_robin"},
    "sparsemixer": {"selector": "sparsemixer", "select_by": "logit", "mixer_eps": 0.3},
    "expert choice": NORM | {"top_k": 8, "selector": "expert_choice", "take_factor": 2.0},
}
# One for each function that has a slope of its own.
SLOPES = (
    "softmax", "sigmoid, norm, scale", "sqrtsoftplus", "selected", "scaled, capped", "clamp", "norm of order 2",
    "norm of order one half", "per_expert", "global, shared in norm", "null, skip", "groups, masked scores",
    "given", "given, selected", "sparsemixer", "relu", "top_p",
)  # fmt: skip


def spec_of(name: str) -> RouterSpec:
    return RouterSpec(**{"num_experts": 8, "top_k": 3} | SPECS[name])


def inputs_of(spec: RouterSpec, num_tokens: int, *, seed: int = 0) -> tuple[np.ndarray, dict]:
    """Logits, some of them -inf, and what else the spec reads."""
    rng = np.random.default_rng(seed)
    T, E, K = num_tokens, spec.num_choices, spec.top_k
    logits_TE = rng.normal(size=(T, spec.num_logits))
    if spec.selector in ("top_k", "sparsemixer") and spec.num_expert_groups is None and K < E:
        logits_TE[::5, 1] = -np.inf
    inputs: dict = {}
    if spec.takes_bias:
        inputs["expert_bias_E"] = rng.normal(size=E) * 0.3
    if spec.learned_scale != "none":
        inputs["learned_scale"] = rng.uniform(0.5, 2, size=E if spec.learned_scale == "per_expert" else ())
    if spec.selector == "table":
        inputs |= {"token_ids_T": rng.integers(0, 7, T), "table_VK": distinct_ids(rng, 7, E, K)}
    if spec.selector == "given":
        inputs["given_ids_TK"] = np.where(rng.random((T, K)) < 0.2, UNUSED, distinct_ids(rng, T, E, K))
    inputs["token_mask_T"] = rng.random(T) < 0.9
    return logits_TE, RouterInputs.keywords(inputs)


def distinct_ids(rng, num_rows: int, num_choices: int, k: int):
    return np.argsort(rng.random((num_rows, num_choices)), axis=-1)[:, :k]


def assert_equal_traces(found, expected, *, rtol: float, valid_T):
    np.testing.assert_array_equal(found.expert_ids_TK, expected.expert_ids_TK)
    for field in ("weights_TK", "scores_TE", "scores_for_choice_TE", "group_scores_TG", "group_ids_TL"):
        compare(field, getattr(found, field), getattr(expected, field), rtol, valid_T)
    compare("shared_weights_TS", found.shared_weights_TS, expected.shared_weights_TS, rtol, valid_T)


def compare(field, found, expected, rtol, valid_T):
    assert (found is None) == (expected is None), field
    if found is not None:
        np.testing.assert_allclose(np.asarray(found)[valid_T], expected[valid_T], rtol=rtol, atol=rtol, err_msg=field)


route = jax.jit(routing.route, static_argnames="spec")


def loss(logits_TE, learned_scale, spec, inputs, factors_TK, factors_TS):
    """A sum of all weights with factors of either sign, and the trace."""
    trace = routing.route(logits_TE, spec, learned_scale=learned_scale, **inputs)
    return weighted_sum(trace, factors_TK, factors_TS), trace


def weighted_sum(trace, factors_TK, factors_TS):
    total = (trace.weights_TK * factors_TK).sum()
    return total if trace.shared_weights_TS is None else total + (trace.shared_weights_TS * factors_TS).sum()


@pytest.mark.parametrize("name", SPECS)
def test_every_stage_and_its_gradient_equal_the_reference_in_float64(name):
    spec = spec_of(name)
    T = 13
    logits_TE, inputs = inputs_of(spec, T)
    scale = inputs.pop("learned_scale", None)
    rng = np.random.default_rng(6)
    factors = rng.normal(size=(T, spec.top_k)), rng.normal(size=(T, spec.num_scored_shared_experts))
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnames="spec")
        found_TE, trace = gradient(
            logits_TE, scale, spec=spec, inputs=inputs, factors_TK=factors[0], factors_TS=factors[1]
        )
    assert trace.weights_TK.dtype == np.float64
    assert trace.expert_ids_TK.dtype == np.int32
    # 1e-13: a few hundred roundings of float64.
    expected = moe_ref.route(logits_TE, spec, learned_scale=scale, **inputs)
    assert_equal_traces(trace, expected, rtol=1e-13, valid_T=inputs["token_mask_T"])

    step = 1e-6
    columns = [*range(min(spec.num_choices, 24)), *range(spec.num_choices, spec.num_logits)]
    for column in columns:
        shift_E = step * (np.arange(spec.num_logits) == column)
        above, below = (
            moe_ref.route(logits_TE + sign * shift_E, spec, learned_scale=scale, **inputs) for sign in (1, -1)
        )
        np.testing.assert_array_equal(above.expert_ids_TK, below.expert_ids_TK)
        differences_T = ((above.weights_TK - below.weights_TK) * factors[0]).sum(axis=-1)
        if spec.num_scored_shared_experts:
            differences_T += ((above.shared_weights_TS - below.shared_weights_TS) * factors[1]).sum(axis=-1)
        # Rounding of the differences: 1e-16 / step = 1e-10, times the number of terms.
        np.testing.assert_allclose(found_TE[:, column], differences_T / (2 * step), rtol=1e-7, atol=3e-9)


@pytest.mark.parametrize("name", ["groups", "global, shared in norm", "wide", "sparsemixer"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token_are_routed(name, num_tokens):
    spec = spec_of(name)
    logits_TE, inputs = inputs_of(spec, num_tokens)
    found, expected = route(logits_TE, spec=spec, **inputs), moe_ref.route(logits_TE, spec, **inputs)
    # 2e-6: some twenty roundings of float32, eps / 2 = 6e-8 each.
    assert_equal_traces(found, expected, rtol=2e-6, valid_T=inputs["token_mask_T"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["sigmoid, norm, scale", "wide groups"])
def test_low_precision_logits_are_routed_in_float32(name, dtype):
    spec = spec_of(name)
    rng = np.random.default_rng(1)
    # Each row a permutation of a grid that bfloat16 holds exactly, so that no two scores are near.
    logits_TE = rng.permuted(np.tile((np.arange(spec.num_experts) - 128) / 32, (17, 1)), axis=1).astype(dtype)
    found, expected = route(logits_TE, spec=spec), moe_ref.route(logits_TE, spec)
    assert found.weights_TK.dtype == np.float32
    # 2e-6: some twenty roundings of float32, eps / 2 = 6e-8 each.
    assert_equal_traces(found, expected, rtol=2e-6, valid_T=slice(None))


@pytest.mark.parametrize("name", ["by logit", "groups, best of three", "wide groups", "many"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_go_to_the_lower_id(name, scale):
    # Logits, because the sums of a group's scores would round.
    spec = spec_of(name).replace(select_by="logit")
    rng = np.random.default_rng(2)
    # Few values, both zeros among them; -0.0 and 0.0 are one value.
    logits_TE = (scale * rng.choice([-1.0, -0.0, 0.0, 1.0], size=(64, spec.num_logits))).astype(np.float32)
    found, expected = route(logits_TE, spec=spec), moe_ref.route(logits_TE, spec, dtype=np.float32)
    np.testing.assert_array_equal(found.expert_ids_TK, expected.expert_ids_TK)
    if spec.num_expert_groups is not None:
        np.testing.assert_array_equal(found.group_ids_TL, expected.group_ids_TL)


@pytest.mark.parametrize(("N", "k"), [(8, 3), (33, 8), (129, 5), (256, 16), (768, 4), (40, 17)])
def test_top_k_equals_a_stable_sort(N, k):
    rng = np.random.default_rng(3)
    scale_T1 = rng.choice([1, 1e30, 1e-30, -0.0], size=(50, 1))
    values_TN = (rng.integers(-9, 9, size=(50, N)) * scale_T1).astype(np.float32)
    values_TN[rng.random(values_TN.shape) < 0.4] = -np.inf
    values_TN[0], values_TN[1, ::2] = -np.inf, np.inf
    found_TK, ids_TK = jax.jit(top_k, static_argnums=1)(values_TN, k)
    expected_TK = np.argsort(-values_TN, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids_TK, expected_TK)
    np.testing.assert_array_equal(found_TK, np.take_along_axis(values_TN, expected_TK, axis=-1))


@pytest.mark.parametrize("name", SLOPES)
def test_gradients_are_finite_whatever_saturated_masked_and_padding_rows_hold(name):
    spec = spec_of(name)
    fills = np.repeat([-np.inf, -1e30, -200.0, -80.0, -41.0, 80.0, 1e30], 4)
    logits_TE, inputs = inputs_of(spec, len(fills), seed=7)
    logits_TE[0::4] = fills[0::4, None]
    logits_TE[1::4, 1::2] = fills[1::4, None]
    logits_TE[2::4, :2] = fills[2::4, None]
    logits_TE[3::4] = np.nan
    inputs["token_mask_T"] = mask_T = np.arange(len(fills)) % 4 < 3
    scale = inputs.pop("learned_scale", None)
    scale = None if scale is None else np.asarray(scale, np.float32)
    argnums = (0,) if scale is None else (0, 1)
    logits_TE = logits_TE.astype(np.float32)
    gradients, trace = jax.jit(jax.grad(loss, argnums, has_aux=True), static_argnames="spec")(
        logits_TE, scale, spec=spec, inputs=inputs, factors_TK=1.5, factors_TS=0.5
    )
    for field in ("weights_TK", "scores_TE", "shared_weights_TS"):
        value = getattr(trace, field)
        assert value is None or np.isfinite(value).all(), field
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][np.isneginf(logits_TE)].any()

    assert (trace.expert_ids_TK[~mask_T] == UNUSED).all()
    assert not trace.weights_TK[~mask_T].any()
    assert trace.shared_weights_TS is None or not trace.shared_weights_TS[~mask_T].any()
    assert not gradients[0][~mask_T].any()


def test_choices_of_logit_minus_infinity_leave_slots_unused():
    logits_TE = np.full((2, 8), -np.inf, np.float32)
    logits_TE[0, [6, 2]] = 1, 2
    for name in ("sigmoid, norm, scale", "by logit", "sparsemixer"):
        spec = spec_of(name)
        found = route(logits_TE, spec=spec)
        np.testing.assert_array_equal(found.expert_ids_TK, [[2, 6, UNUSED], [UNUSED] * 3])
        np.testing.assert_array_equal(np.not_equal(found.weights_TK, 0), np.not_equal(found.expert_ids_TK, UNUSED))


def test_a_nan_logit_is_not_hidden():
    logits_TE = np.zeros((2, 256), np.float32)
    logits_TE[0, 9], logits_TE[1, 200] = np.nan, -np.nan
    spec = spec_of("wide groups")
    assert np.isnan(route(logits_TE, spec=spec).weights_TK).any(axis=-1).all()


def test_random_ids_are_distinct_and_follow_the_key():
    spec = RouterSpec(num_experts=8, top_k=3, selector="random")
    logits_TE = np.zeros((400, 8), np.float32)
    first, again, other = (
        route(logits_TE, spec=spec, inputs=RouterInputs(seed=jax.random.key(seed))).expert_ids_TK for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    assert np.diff(np.sort(first, axis=-1), axis=-1).all()
    # Expected 150 of each, standard deviation 10.
    assert (np.abs(np.bincount(np.ravel(first), minlength=8) - 150) < 60).all()


def test_a_token_id_outside_the_table_leaves_its_slots_unused():
    spec = RouterSpec(num_experts=8, top_k=2, selector="table")
    inputs = RouterInputs(token_ids_T=np.array([1, 2, -1, 0]), table_VK=np.array([[0, 1], [2, 3]]))
    found = route(np.zeros((4, 8), np.float32), spec=spec, inputs=inputs)
    np.testing.assert_array_equal(found.expert_ids_TK, [[2, 3], [UNUSED] * 2, [UNUSED] * 2, [0, 1]])


def test_route_maps_over_a_batch():
    spec = spec_of("groups")
    logits_BTE = np.random.default_rng(8).normal(size=(2, 5, 12)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda logits_TE: routing.route(logits_TE, spec)))(logits_BTE)
    for batch in range(2):
        alone = route(logits_BTE[batch], spec=spec)
        np.testing.assert_array_equal(found.expert_ids_TK[batch], alone.expert_ids_TK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_TE": np.zeros((3, 7))}, r"logits_TE has shape \(3, 7\); it is \(any, 8\)"),
        ({"logits_TE": np.zeros((3, 8), int)}, "logits_TE has dtype int32; it is float"),
        ({"expert_bias_E": np.zeros(7)}, r"expert_bias_E has shape \(7,\); it is \(8\)"),
        ({"token_mask_T": np.ones(3)}, "token_mask_T has dtype float32; it is bool"),
        ({"token_mask_T": np.ones(2, bool)}, r"token_mask_T has shape \(2,\); it is \(3\)"),
        ({"learned_scale": 1.0}, "learned_scale is given"),
        ({"seed": jax.random.key(0)}, "seed is given, but selector 'top_k' takes none"),
        ({"selector": "random"}, "seed is None; selector 'random' draws with a jax.random key"),
        ({"selector": "given", "given_ids_TK": np.zeros((3, 2))}, "given_ids_TK has dtype float64; it is int"),
        ({"selector": "given"}, "given_ids_TK is None; selector 'given' needs it"),
        (
            {"selector": "given", "given_ids_TK": np.zeros((3, 2), int), "expert_bias_E": np.zeros(8)},
            "expert_bias_E is given, but selector 'given'",
        ),
        ({"spec_scale": "global"}, "learned_scale is None; the spec's is 'global'"),
    ],
)
def test_a_wrong_input_is_named(changes, message):
    spec = RouterSpec(
        num_experts=8,
        top_k=2,
        selector=changes.pop("selector", "top_k"),
        learned_scale=changes.pop("spec_scale", "none"),
    )
    with pytest.raises(ValueError, match=message):
        routing.route(**{"logits_TE": np.zeros((3, 8), np.float32), "spec": spec} | RouterInputs.keywords(changes))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_gate_sums_in_float32(dtype):
    rng = np.random.default_rng(9)
    x_TD, gate_ED, bias_E = (rng.normal(size=shape).astype(dtype) for shape in ((5, 64), (8, 64), (8,)))
    found_TE = Jax().gate(x_TD, gate_ED, bias_E)
    assert found_TE.dtype == np.float32
    # 64 products of order 1: 64 * eps / 2.
    np.testing.assert_allclose(found_TE, moe_ref.gate(x_TD, gate_ED, bias_E), atol=4e-6)


def test_the_subject_returns_numpy():
    spec = spec_of("groups")
    logits_TE, inputs = inputs_of(spec, 5)
    found = Jax().route(
        logits_TE.astype(np.float32), spec, inputs["expert_bias_E"], token_mask_T=inputs["token_mask_T"]
    )
    np.testing.assert_array_equal(found.expert_ids_TK, moe_ref.route(logits_TE, spec, **inputs).expert_ids_TK)
    assert isinstance(found.group_ids_TL, np.ndarray)
