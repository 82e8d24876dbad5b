"""conformance, layer: prescribed logits, so that a subject with nothing but `layer` shows how it routes.

The gate has one row for each of the first features of a token, which are its logits. Every router of the kind router is
tried, and the tokens of one case have logits of all kinds.

Legend: T tokens, D model dim, E columns of the logits, K top_k.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from conformance.core.case import float32
from conformance.core.rounding import EPSILON
from conformance.layer.bounds import stable_T
from conformance.layer.case import LayerCase
from conformance.router.bounds import score_floor, underflows_T
from conformance.router.draw import SPECS, bias_of_kind, inputs_of, logits_of_kind
from moe_ref import UNUSED, ExpertSpec, LayerParams, LayerSpec, RouterSpec, SharedSpec
from moe_ref.routing import gather
from moe_ref.specs.families import tiny

KINDS = ("separated", "normal", "close", "large", "negative", "huge", "far", "tied", "equal", "one_hot")
"""Of the logits of a token, one after the other."""
BIASES = ("mixed", "negative", "positive", "strong", "none")
EACH = 3
"""Tokens of each kind."""
SCALE = 2.0**10
"""Of the gate, exact in any dtype: logits of a thousand come from tokens of order 1."""
FURTHER = 4
"""Features at least that are no logits."""
EDGE = 1e-4
"""A distance this near to the band of sparsemixer, relative to the logits, may count as inside or outside."""
CLOSE = 2.0**-9
"""Between close logits: bfloat16 cannot tell them apart, float32 can."""


def layer_of(router: RouterSpec) -> LayerSpec:
    """A narrow layer around a router, wide enough for its logits."""
    dim = 8 * -(-(router.num_logits + FURTHER) // 8)
    shared = SharedSpec(hidden_dim=8) if router.num_scored_shared_experts else None
    return LayerSpec(router=router, experts=ExpertSpec(dim=dim, hidden_dim=24), shared=shared)


ROUTED_SPECS = [layer_of(router) for router in SPECS if router.selector != "random" and not router.reads_batch]
"""Of each router but the random one, whose choice nobody can foresee, and those that read the whole batch: here logits
of all kinds are one."""
THIN_ROUTED_SPECS = [layer_of(tiny("deepseek_v3"))]
"""For subjects that compile; those have a `route`, as a rule, whose logits are any."""


def prescribes(spec: LayerSpec) -> bool:
    """Whether its tokens are wide enough to hold their logits."""
    return spec.experts.dim >= spec.router.num_logits


@lru_cache(maxsize=256)
def make_case(spec: LayerSpec, seed: int) -> LayerCase:
    """The case of a seed: a bias of one kind, logits of all kinds."""
    rng, router = np.random.default_rng(seed), spec.router
    T, D, E = EACH * len(KINDS), spec.experts.dim, router.num_logits
    logits_TE = np.concatenate([_logits(kind, (EACH, E), rng) for kind in KINDS])
    x_TD = np.concatenate([logits_TE / SCALE, rng.normal(size=(T, D - E))], axis=1)
    bias_E = bias_of_kind(BIASES[seed % len(BIASES)], router, rng)
    if bias_E is not None and seed % 2:
        # Differences that bfloat16 loses, as those of close logits are.
        bias_E = np.round(bias_E) + rng.permutation(len(bias_E)) * CLOSE
    inputs: dict[str, Any] = inputs_of(router, T, (), rng)
    learned_scale = inputs.pop("learned_scale", None)
    made = LayerParams.init(spec, int(rng.integers(2**31)))
    params = LayerParams(**{name: float32(value) for name, value in made.by_name().items()})
    params = replace(
        params,
        gate_ED=SCALE * np.eye(E, D),
        gate_bias_E=None if params.gate_bias_E is None else np.zeros(E),
        expert_bias_E=None if bias_E is None else float32(bias_E),
        learned_scale=learned_scale,
    )
    d_output_TD = float32(rng.normal(size=(T, D)))
    return LayerCase(spec=spec, params=params, x_TD=float32(x_TD), d_output_TD=d_output_TD, inputs=inputs, seed=seed)


def _logits(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    if kind == "close":
        return 1 + rng.permuted(np.tile(np.arange(shape[1]) * CLOSE, (shape[0], 1)), axis=-1)
    return logits_of_kind(kind, shape, rng)


def clear_T(case: LayerCase, dtype: str) -> np.ndarray:
    """(T,) whether neither the choice nor the weights of a token hang on rounding, of tiny scores or of a band."""
    found_T, trace = stable_T(case, dtype).copy(), case.reference.routing
    if trace.scores_TE is not None:
        chosen_TK = gather(trace.scores_TE, trace.expert_ids_TK)
        # Weights of scores that nearly underflow have no relative accuracy.
        least = score_floor(case.router_case, dtype) / EPSILON[dtype]
        found_T &= (chosen_TK.max(axis=-1, initial=0) > least) | (trace.expert_ids_TK == UNUSED).all(axis=-1)
    if case.spec.router.selector == "sparsemixer":
        found_T &= _off_the_band_T(trace.scaled_logits_TE, trace.expert_ids_TK, case.spec.router)
    if case.spec.router.selector == "group_top_k":
        found_T &= _apart_T(trace.scaled_logits_TE)
    return found_T


def may_be_no_number_T(case: LayerCase, dtype: str) -> np.ndarray:
    """(T,) whether all scores underflow that a token chose by its scores: that its weights are finite is a SHOULD."""
    found_T = underflows_T(case.router_case, case.reference.routing.expert_ids_TK, dtype)
    return found_T & (case.spec.router.selector == "top_k")


def _apart_T(logits_TE: np.ndarray) -> np.ndarray:
    """No two logits are near each other."""
    size_T1 = np.abs(logits_TE).max(axis=-1, keepdims=True)
    return (np.diff(np.sort(logits_TE, axis=-1), axis=-1) > EDGE * size_T1).all(axis=-1)


def _off_the_band_T(logits_TE: np.ndarray, expert_ids_TK: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """No two logits are near each other, and none is near the edge of the band below a chosen one."""
    size_T1 = np.abs(logits_TE).max(axis=-1, keepdims=True)
    found_T = _apart_T(logits_TE)
    for best_T in np.moveaxis(expert_ids_TK, -1, 0):
        best_T1 = np.take_along_axis(logits_TE, best_T[:, None], axis=-1)
        edge_TE = 2 * spec.mixer_eps * np.maximum(np.abs(logits_TE), best_T1)
        found_T &= (np.abs(best_T1 - logits_TE - edge_TE) > EDGE * size_T1).all(axis=-1)
    return found_T
