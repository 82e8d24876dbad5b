"""moe_ref, what the tests of the gradients share: derivatives of a forward pass, and routers that use every field.

Central differences of fourth order with a step of 1e-4 leave an error near 1e-11 of functions of size 1, nearly all of
it rounding; the bound is 1e-8, relative to the largest entry of the gradient. Steps are short so that no choice and no
clamp flips on the way. Where a forward pass runs on complex numbers, the derivative is the imaginary part at a step of
1e-30, with no cancellation at all, and the bound is 1e-13.
"""

from typing import Any

import numpy as np

from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.router import RouterSpec

T, D, F, E = 6, 5, 4, 8
STEP = 1e-4
BOUND = 1e-8
COMPLEX_BOUND = 1e-13


def difference(function, values):
    """The gradient of a function of an array, entry by entry."""
    gradient = np.zeros_like(values)
    for where in np.ndindex(values.shape):

        def at(offset, where=where):
            moved = values.copy()
            moved[where] += offset
            return function(moved)

        gradient[where] = (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)
    return gradient


def slope_along(function, values, direction):
    """The derivative of a function of an array along one direction."""
    return difference(lambda length: function(values + length * direction), np.zeros(())).item()


def complex_gradient(function, values):
    """The gradient of a function of an array that runs on complex numbers, entry by entry."""
    gradient = np.zeros_like(values)
    for where in np.ndindex(values.shape):
        moved = values.astype(complex)
        moved[where] += 1e-30j
        gradient[where] = function(moved).imag / 1e-30
    return gradient


def assert_close(found, expected, bound=BOUND):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * max(1.0, np.abs(expected).max(initial=0)))


GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}
SIGMOID_NORM: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True}

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax_norm": {"route_norm": True, "router_dtype": "float64"},
    "sigmoid_norm": SIGMOID_NORM,
    "norm_add_eps": SIGMOID_NORM | {"norm_eps": 3.0},
    "norm_clamp_active": SIGMOID_NORM | {"norm_eps": 10.0, "norm_form": "clamp"},
    "norm_clamp_idle": SIGMOID_NORM | {"norm_eps": 0.1, "norm_form": "clamp"},
    "norm_p_2": SIGMOID_NORM | {"norm_p": 2.0},
    "norm_p_3_add_eps": SIGMOID_NORM | {"norm_p": 3.0, "norm_eps": 0.3},
    "norm_p_half": SIGMOID_NORM | {"norm_p": 0.5},
    "sqrtsoftplus": {"score_func": "sqrtsoftplus"},
    "sqrtsoftplus_norm": {"score_func": "sqrtsoftplus", "route_norm": True, "route_scale": 2.5},
    "selected": {"score_over": "selected", "select_by": "logit"},
    "logit_scale": {"logit_scale": 0.7, "route_scale": 1.5},
    "softcap": {"logit_scale": 1.3, "logit_softcap": 2.0, "score_func": "sigmoid"},
    "groups": SIGMOID_NORM | GROUPS,
    "groups_filled_with_0": SIGMOID_NORM | GROUPS | {"mask_fill": 0.0, "weights_from": "masked_scores"},
    "groups_top_1": GROUPS | {"group_score_k": 1, "weights_from": "masked_scores"},
    "by_logit": {"score_func": "sigmoid", "select_by": "logit", "weight_on": "input"},
    "per_expert_scale": {"route_norm": True, "learned_scale": "per_expert", "route_scale": 1.7},
    "global_scale": {"learned_scale": "global"},
    "null": {"num_experts": 5, "num_null_experts": 3},
    "null_skip": {"num_experts": 5, "num_null_experts": 3, "null_kind": "skip", "route_norm": True,
                  "learned_scale": "per_expert"},
    "null_kinds": SIGMOID_NORM | {"num_experts": 3, "num_null_experts": 5, "num_constant_experts": 2,
                                  "num_zero_experts": 2, "norm_eps": 0.1},
    "null_kinds_on_input": {"num_experts": 4, "num_null_experts": 4, "num_constant_experts": 2, "num_zero_experts": 1,
                            "weight_on": "input"},
    "scored_shared": {"score_func": "sigmoid", "num_scored_shared_experts": 2, "output_scale": 3.0},
    "inkling": SIGMOID_NORM | {"num_scored_shared_experts": 2, "norm_with_shared": True, "learned_scale": "global",
                               "route_scale": 8.0},
    "sparsemixer": {"selector": "sparsemixer", "select_by": "logit", "mixer_eps": 0.4},
    "sinkhorn": {"selector": "sinkhorn", "select_by": "logit"},
    "expert_choice": {"top_k": 8, "selector": "expert_choice", "take_factor": 2.0, "take_rounding": "floor",
                      "take_least": 1, "route_norm": True},
    "group_top_k": {"top_k": 4, "selector": "group_top_k", "quota_groups": 2, "route_norm": True},
    "relu": {"top_k": E, "score_func": "relu", "selector": "threshold", "route_scale": 1.5},
    "relu_norm": {"score_func": "relu", "selector": "threshold", "route_norm": True, "norm_p": 2.0, "norm_eps": 0.1},
    "threshold": SIGMOID_NORM | {"top_k": 5, "selector": "threshold", "threshold": 0.25},
    "top_p": {"top_k": 5, "selector": "top_p", "top_p": 0.8, "route_norm": True},
    "table": {"selector": "table"},
    "given": SIGMOID_NORM | {"selector": "given"},
    "given_selected": {"selector": "given", "score_over": "selected", "select_by": "logit"},
    "round_robin": {"selector": "round_robin"},
    "random": {"selector": "random", "score_func": "sigmoid"},
}  # fmt: skip


def router(name):
    fields: dict[str, Any] = {"num_experts": E, "top_k": 3} | ROUTERS[name]
    return RouterSpec(**fields)


def router_inputs(spec):
    """Keyword arguments of `route` beside the logits; choice biases are so mixed that a fill of 0 often wins."""
    rng = np.random.default_rng(11)
    inputs: dict[str, Any] = {}
    if spec.takes_bias:
        inputs["expert_bias_E"] = rng.standard_normal(spec.num_choices) - 0.5
    if spec.selector == "table":
        inputs |= {"token_ids_T": np.arange(T) % 2, "table_VK": np.array([[0, 3, 7], [5, 2, 1]])}
    if spec.selector == "given":
        inputs["given_ids_TK"] = np.array([[0, 3, 7], [5, -1, 1], [-1, -1, -1], [2, 3, 4], [7, 0, -1], [1, 0, 2]])
    if spec.learned_scale != "none":
        shape = (spec.num_choices,) if spec.learned_scale == "per_expert" else ()
        inputs["learned_scale"] = rng.uniform(0.5, 1.5, shape)
    return RouterInputs.keywords(inputs)
