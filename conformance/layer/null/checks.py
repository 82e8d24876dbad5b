"""conformance, layer: null. Null experts that are more than nothing, or less than a copy."""

from dataclasses import replace

from conformance.layer.case import LayerCase
from conformance.layer.kind import requires
from conformance.layer.predicates import CONSTANTS, PARTS, WHOLE
from conformance.layer.verdicts import ROUTER_IS_WRONG, hold_gradients, hold_layer
from moe_ref import LayerSpec


def has_constants(spec: LayerSpec) -> bool:
    """Some null experts are constant."""
    return spec.router.num_constant_experts > 0


def without_constants(case: LayerCase) -> LayerCase:
    """The same layer, whose constant experts are copies."""
    router = case.spec.router.replace(num_constant_experts=0)
    params = replace(case.params, **dict.fromkeys(CONSTANTS))
    return case.with_(spec=case.spec.replace(router=router), params=params)


@requires(
    "NUL-1",
    method="layer",
    spec=has_constants,
    after=PARTS,
    simpler=((without_constants, WHOLE),),
    unless=(ROUTER_IS_WRONG,),
)
def a_constant_expert_mixes_its_token_with_its_vector(judge, case):
    router = case.spec.router
    title = f"not with {router.num_constant_experts} constant and {router.num_zero_experts} zero experts"
    hold_layer(judge, case, title)


@requires(
    "NUL-2",
    method="layer_gradients",
    spec=has_constants,
    after=(*PARTS, *WHOLE, "BWD-1"),
    unless=(ROUTER_IS_WRONG,),
)
def constant_experts_get_the_gradients_of_their_tokens(judge, case):
    hold_gradients(judge, case, CONSTANTS, "not the gradient of its tokens")
