"""moe_jax, dense matmul: the layer, every expert on every token; for few experts, and to check `sparse_matmul` by.

With a capacity every expert works on that many places instead, and two masks (T, E, C) move tokens there and back.

Legend: T tokens, D model dim, E experts, F expert hidden dim, K top_k, C places of an expert.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import routing
from moe_jax.arrays import AxisName
from moe_jax.capacity import most_slots, slot_places
from moe_jax.experts import hide, join, keep_tokens, null_output
from moe_jax.explicit import in_any_mode, output_and_choice
from moe_jax.latent import compress, expand
from moe_jax.sparse_matmul import RouteOutput, limit, route_tokens
from moe_jax.tokens import check_open, flat, flat_tokens, like_tokens, sequences_of
from moe_ref.specs.balance import CapacitySpec, check_capacity
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


@in_any_mode(output_and_choice)
def dense_matmul(
    x: jax.Array,
    params: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T: jax.Array | None = None,
    inputs: RouterInputs = NO_INPUTS,
    capacity: CapacitySpec | None = None,
    sequence_of_T: jax.Array | None = None,
    num_sequences: int = 1,
    axis_name: AxisName = None,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, RouteOutput]:
    """One MoE layer: every expert works on every token, and what was not routed is left out of the sum.

    E / K times the work of `sparse_matmul`, and (T, E, F) in memory, without moving a row. With a capacity it is the
    work of E * C rows, tokens are moved by products with masks, and one that is not finite reaches the others.
    Arguments as there.
    """
    x_TD, token_mask_T = flat_tokens(x, spec), flat("token_mask_T", token_mask_T, x)
    check_capacity(spec.router, capacity)
    check_open(x_TD, spec.router, capacity=capacity)
    clean_x_TD = keep_tokens(x_TD, token_mask_T)
    logits_TE = routing.gate(clean_x_TD, params.gate_ED, params.gate_bias_E, spec=spec.router)
    decided, _ = route_tokens(
        logits_TE,
        spec.router,
        expert_bias_E=params.expert_bias_E,
        learned_scale=params.learned_scale,
        token_mask_T=token_mask_T,
        inputs=inputs,
    )
    expert_input_TD = compress(clean_x_TD, params, precision=precision)
    if capacity is None:
        routed_TD = _all_experts(expert_input_TD, params, decided, spec, precision)
    else:
        sequence_of_T, num_sequences = sequences_of(x, sequence_of_T, num_sequences)
        decided, _ = limit(
            decided, capacity, spec.router.num_experts, token_mask_T=token_mask_T, sequence_of_T=sequence_of_T,
            num_sequences=num_sequences, axis_name=axis_name,
        )  # fmt: skip
        batch = len(x_TD) if axis_name is None or capacity.scope == "rank" else len(x_TD) * lax.axis_size(axis_name)
        num_places = most_slots(capacity, batch, spec.router.top_k, spec.router.num_experts, num_sequences)
        routed_TD = _places_of_experts(expert_input_TD, params, decided, spec, min(num_places, len(x_TD)), precision)
    summed_TD = routed_TD + null_output(expert_input_TD, decided.expert_ids_TK, decided.weights_TK, params, spec.router)
    scaled_TD = expand(summed_TD * spec.router.output_scale, params, spec, precision=precision)
    output_TD = join(scaled_TD, clean_x_TD, decided.shared_weights_TS, params, spec, precision=precision)
    return like_tokens(keep_tokens(output_TD, token_mask_T), x), decided


def _all_experts(x_TD, params: LayerParams, decided: RouteOutput, spec: LayerSpec, precision) -> jax.Array:
    einsum = partial(jnp.einsum, precision=precision)
    routed_TE1, weights_TE1 = _by_expert(decided, spec.router.num_experts, x_TD.dtype)
    # A factor on the input is the same factor on a projection of it, which is linear.
    on_input = spec.router.weight_on == "input"
    input_weights, output_weights = (weights_TE1, 1) if on_input else (1, weights_TE1)

    def up(w_EDF, b_EF):
        projected_TEF = einsum("td,edf->tef", x_TD, w_EDF) * input_weights
        return projected_TEF if b_EF is None else projected_TEF + jnp.asarray(b_EF)[None]

    gate_TEF = None if params.w_gate_EDF is None else up(params.w_gate_EDF, params.b_gate_EF)
    hidden_TEF = hide(gate_TEF, up(params.w_up_EDF, params.b_up_EF), spec.experts)
    # Selected, not multiplied by 0: an expert that was not asked may overflow.
    weighed_TEF = jnp.where(routed_TE1, hidden_TEF * output_weights, 0)
    routed_TD = einsum("tef,efd->td", weighed_TEF, params.w_down_EFD)
    if params.b_down_ED is None:
        return routed_TD
    return routed_TD + einsum("te,ed->td", jnp.where(routed_TE1, output_weights, 0)[:, :, 0], params.b_down_ED)


def _places_of_experts(x_TD, params: LayerParams, decided: RouteOutput, spec: LayerSpec, num_places: int, precision):
    """Every expert works on its places; an empty place is a token of 0, and belongs to nobody."""
    einsum, E = partial(jnp.einsum, precision=precision), spec.router.num_experts
    ids_TK, dtype = decided.expert_ids_TK, x_TD.dtype
    is_expert_TKE = (ids_TK[:, :, None] == jnp.arange(E)[None, None]).astype(dtype)
    is_place_TKC = (slot_places(ids_TK, E)[:, :, None] == jnp.arange(num_places)[None, None]).astype(dtype)
    dispatch_TEC = einsum("tke,tkc->tec", is_expert_TKE, is_place_TKC)
    combine_TEC = einsum("tke,tkc,tk->tec", is_expert_TKE, is_place_TKC, decided.weights_TK.astype(dtype))
    if spec.router.weight_on == "input":
        dispatch_TEC, combine_TEC = combine_TEC, dispatch_TEC

    def project(rows_ECD, w_EDF, b_EF):
        projected_ECF = einsum("ecd,edf->ecf", rows_ECD, w_EDF)
        return projected_ECF if b_EF is None else projected_ECF + b_EF[:, None]

    rows_ECD = einsum("tec,td->ecd", dispatch_TEC, x_TD)
    gate_ECF = None if params.w_gate_EDF is None else project(rows_ECD, params.w_gate_EDF, params.b_gate_EF)
    hidden_ECF = hide(gate_ECF, project(rows_ECD, params.w_up_EDF, params.b_up_EF), spec.experts)
    output_ECD = project(hidden_ECF, params.w_down_EFD, params.b_down_ED)
    return einsum("tec,ecd->td", combine_TEC, output_ECD)


def _by_expert(decided: RouteOutput, num_experts: int, dtype) -> tuple[jax.Array, jax.Array]:
    """(T, E, 1) whether a token visits each expert, and with which weight."""
    is_expert_TKE = decided.expert_ids_TK[:, :, None] == jnp.arange(num_experts)[None, None]
    weights_TE = jnp.where(is_expert_TKE, decided.weights_TK[:, :, None], 0).sum(axis=1)
    return is_expert_TKE.any(axis=1)[:, :, None], weights_TE[:, :, None].astype(dtype)
