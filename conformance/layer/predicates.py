"""conformance, layer: what its chapters share. Simpler neighbours, conditions, names of parameters."""

from dataclasses import fields, replace
from typing import TypeVar

import numpy as np

from conformance.core.case import float32
from conformance.core.check import Condition
from conformance.core.judge import Judge
from conformance.layer.bounds import stable_T
from conformance.layer.case import LayerCase
from moe_ref import LayerParams, LayerSpec, RouterSpec

PARTS = ("EXP-2", "EXP-3", "EXP-4", "EXP-5", "EXP-11", "CMB-2", "CMB-3", "CMB-5", "CMB-7", "LAY-1")
"""Where one of these fails on the same case, the layer fails too, and is not the one to blame."""
WHOLE = ("LAY-2", "LAY-8", "LAY-9", "LAY-10", "LAY-11", "LAY-12", "LAY-13", "LAT-1", "LAT-2", "LAT-3", "NUL-1")
"""What the output of a layer is; each layer has one of them."""
GRADIENTS = ("BWD-2", "BWD-3", "BWD-4", "BWD-5", "BWD-8", "BWD-10", "BWD-18", "BWD-19", "LAT-4", "NUL-2")
"""What its gradients are."""
POISON = (np.nan, 1e30, np.nan)
"""What rows hold that nobody reads, in calls one after the other."""

MATRICES = ("w_up_EDF", "w_gate_EDF", "w_down_EFD")
BIASES = ("b_up_EF", "b_gate_EF", "b_down_ED")
ROUTER = ("gate_ED", "gate_bias_E", "learned_scale")
CONSTANTS = ("constant_w_ZD2", "constant_ZD")
LATENT = ("latent_w_down_DH", "latent_w_up_HD", "latent_norm_H")
SHARED = ("shared_w_up_SDF", "shared_w_gate_SDF", "shared_w_down_SFD", "shared_token_gate_D")


def by_token(spec: LayerSpec) -> bool:
    """Selectors that look at the token alone, not at its place or at the batch."""
    return spec.router.selector != "round_robin" and not spec.router.reads_batch


def chosen_alone(spec: LayerSpec) -> bool:
    """Routers whose choice for a token does not depend on which other tokens are padding."""
    return not spec.router.reads_batch


def takes_tokens(spec: LayerSpec) -> bool:
    """Experts that take the tokens of a batch."""
    return spec.router.selector == "expert_choice"


def tokens_choose(spec: LayerSpec) -> bool:
    """Experts that tokens choose, of which a capacity may be asked."""
    return not takes_tokens(spec)


def sees_tokens(spec: LayerSpec) -> bool:
    """Experts that see the tokens, not a latent."""
    return spec.latent is None


def _choice_is_clear(judge: Judge, case: LayerCase) -> bool:
    return bool(stable_T(case, judge.subject.compute_dtype).all())


CHOICE_IS_CLEAR = Condition(sentence="judged where every choice is beyond doubt", holds=_choice_is_clear)
"""Elsewhere rounding may change a choice, and with it every gradient."""


def _leaves_an_expert_idle(judge: Judge, case: LayerCase) -> bool:
    idle_E = case.reference.permutation.tokens_per_expert_E == 0
    return bool(idle_E.any()) and CHOICE_IS_CLEAR.holds(judge, case)


IDLE_EXPERT = Condition(sentence="judged where an expert is surely without tokens", holds=_leaves_an_expert_idle)


# neighbours

OfLayer = TypeVar("OfLayer", bound=LayerCase)


def without_shared(case: OfLayer) -> OfLayer:
    """The same layer without its shared experts."""
    names = (f.name for f in fields(LayerParams) if f.name.startswith("shared_"))
    return case.with_(spec=case.spec.replace(shared=None), params=replace(case.params, **dict.fromkeys(names)))


def routed_alone(case: OfLayer) -> OfLayer | None:
    """The same layer without its shared experts, where it has some and the router does not score them."""
    if case.spec.router.num_scored_shared_experts or case.spec.shared is None:
        return None
    return without_shared(case)


def without_latent(case: OfLayer) -> OfLayer:
    """The same layer with other experts, which see the tokens."""
    spec = case.spec.replace(latent=None)
    made = LayerParams.init(spec, case.seed)
    changes = {name: getattr(made, name) for name in (*MATRICES, *BIASES) if getattr(made, name) is not None}
    floats = {name: float32(value) for name, value in changes.items()}
    return case.with_(spec=spec, params=replace(case.params, **floats, **dict.fromkeys(LATENT)))


def plainly_routed(case: OfLayer) -> OfLayer | None:
    """The same experts under a plain softmax router and ordinary logits; None where columns of the gate are others'."""
    router, rng = case.spec.router, case.rng()
    if router.num_logits != router.num_experts:
        return None
    plain = RouterSpec(num_experts=router.num_experts, top_k=router.top_k)
    return case.with_(
        spec=case.spec.replace(router=plain, gate_bias=False),
        x_TD=float32(rng.normal(size=case.x_TD.shape)),
        params=replace(
            case.params,
            gate_ED=float32(rng.normal(size=case.params.gate_ED.shape)),
            gate_bias_E=None,
            expert_bias_E=None,
            learned_scale=None,
        ),
        inputs={},
    )


def unlimited(case: OfLayer) -> OfLayer:
    """The same without a capacity."""
    return case.with_inputs(capacity=None, sequence_lengths=None, tokens_per_shard=None)


def unlimited_and_unmasked(case: OfLayer) -> OfLayer:
    """The same without a capacity, none of the tokens padding."""
    return unmasked(unlimited(case))


def unaligned(case: OfLayer) -> OfLayer:
    """The same with rows as they are."""
    return case.with_inputs(align=None)


def takes_ids(spec: LayerSpec) -> bool:
    """Routers whose choice is given."""
    return spec.router.selector == "given"


def without_given_weights(case: OfLayer) -> OfLayer:
    """The same choice with the router's own weights."""
    return case.with_inputs(given_weights_TK=None)


def unmasked(case: OfLayer) -> OfLayer:
    """The same tokens, none of them padding."""
    return case.with_inputs(token_mask_T=None)


def poisoned(case: OfLayer, poison: float) -> OfLayer:
    """The same with this in every padding row."""
    return case.with_(x_TD=np.where(case.valid_T[:, None], case.x_TD, poison))
