"""conformance, layer: latent. A width of the routed experts' own.

Legend: T tokens, D model dim, H latent dim.
"""

from dataclasses import replace

from conformance.core.holding import hold
from conformance.layer.case import LayerCase
from conformance.layer.kind import requires
from conformance.layer.predicates import LATENT, PARTS, WHOLE, without_latent
from conformance.layer.verdicts import (
    ROUTER_IS_WRONG,
    hold_gradients,
    hold_layer,
    judged_T,
    output_of_subject,
    radius_of_output,
)
from moe_ref import LayerSpec

STRETCH = 4.0
"""Of the latent; a power of 2, which rounds nothing."""


def has_latent(spec: LayerSpec) -> bool:
    """Experts with a width of their own."""
    return spec.latent is not None


def has_norm(spec: LayerSpec) -> bool:
    """A latent with a norm."""
    return spec.latent is not None and spec.latent.norm_eps is not None


def returns_no_input(spec: LayerSpec) -> bool:
    """Without null experts that return what experts see."""
    return len(spec.router.identity_ids) == 0 and spec.router.num_constant_experts == 0


def without_norm(case: LayerCase) -> LayerCase | None:
    """The same latent without its norm."""
    if case.spec.latent is None:
        return None
    latent = case.spec.latent.replace(norm_eps=None)
    return case.with_(spec=case.spec.replace(latent=latent), params=replace(case.params, latent_norm_H=None))


@requires(
    "LAT-1",
    method="layer",
    spec=lambda s: has_latent(s) and not has_norm(s),
    after=(*PARTS, "LAT-2"),
    simpler=((without_latent, WHOLE),),
    unless=(ROUTER_IS_WRONG,),
)
def experts_see_the_down_projection(judge, case):
    hold_layer(judge, case, "not up(sum of weight * expert(down(token))), and the shared experts")


@requires("LAT-2", method="layer", spec=lambda s: has_latent(s) and returns_no_input(s), tokens=(7,), after=("LAY-1",))
def router_and_shared_experts_read_the_token(judge, case):
    # A latent that is larger, and experts that multiply by as much less, are the same layer.
    params = case.params
    inverse = {
        name: value / STRETCH for name in ("w_up_EDF", "w_gate_EDF") if (value := getattr(params, name)) is not None
    }
    stretched = case.with_params(latent_w_down_DH=STRETCH * params.latent_w_down_DH, **inverse)
    found_TD, wanted_TD = output_of_subject(judge, stretched), output_of_subject(judge, case)
    title = f"changed by a latent that is {STRETCH:g} times as large"
    hold(title, found_TD, wanted_TD, 2 * radius_of_output(judge, case), rows=judged_T(judge, case))


@requires(
    "LAT-3",
    method="layer",
    spec=has_norm,
    x=("normal", "small", "large"),
    after=(*PARTS, "LAT-2"),
    simpler=((without_norm, ("LAT-1",)), (without_latent, WHOLE)),
    unless=(ROUTER_IS_WRONG,),
)
def the_weighted_sum_is_normed_before_it_is_projected_up(judge, case):
    assert case.spec.latent is not None
    hold_layer(judge, case, f"not up(norm(sum of weight * expert)) with norm_eps {case.spec.latent.norm_eps}")


@requires(
    "LAT-4",
    method="layer_gradients",
    spec=has_latent,
    after=(*PARTS, *WHOLE, "BWD-1"),
    unless=(ROUTER_IS_WRONG,),
)
def the_latent_gets_the_gradients_of_every_token(judge, case):
    hold_gradients(judge, case, LATENT, "not the gradient of every token")
