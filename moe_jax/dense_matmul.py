"""moe_jax, dense matmul: the layer, every expert on every token; for few experts, and to check `sparse_matmul` by.

Legend: T tokens, D model dim, E experts, F expert hidden dim, K top_k.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import routing
from moe_jax.experts import hide, join, keep_tokens, null_output
from moe_jax.sparse_matmul import RouteOutput, check_tokens, route
from moe_ref.spec import LayerSpec
from moe_ref.weights import LayerParams


def dense_matmul(
    x_TD,
    params: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T=None,
    precision: lax.PrecisionLike = None,
    **selector_inputs,
) -> tuple[jax.Array, RouteOutput]:
    """One MoE layer: every expert works on every token, and what was not routed is left out of the sum.

    E / K times the work of `sparse_matmul`, and (T, E, F) in memory, without moving a row. Arguments as there.
    """
    check_tokens(x_TD, spec)
    clean_x_TD = keep_tokens(jnp.asarray(x_TD), token_mask_T)
    logits_TE = routing.gate(clean_x_TD, params.gate_ED, params.gate_bias_E)
    decided, _ = route(
        logits_TE,
        spec.router,
        expert_bias_E=params.expert_bias_E,
        learned_scale=params.learned_scale,
        token_mask_T=token_mask_T,
        **selector_inputs,
    )
    routed_TD = _all_experts(clean_x_TD, params, decided, spec, precision)
    summed_TD = routed_TD + null_output(clean_x_TD, decided.expert_ids_TK, decided.weights_TK, spec.router)
    scaled_TD = summed_TD * spec.router.output_scale
    output_TD = join(scaled_TD, clean_x_TD, decided.shared_weights_TS, params, spec, precision=precision)
    return keep_tokens(output_TD, token_mask_T), decided


def _all_experts(x_TD, params: LayerParams, decided: RouteOutput, spec: LayerSpec, precision) -> jax.Array:
    einsum = partial(jnp.einsum, precision=precision)
    routed_TE1, weights_TE1 = _by_expert(decided, spec.router.num_experts, x_TD.dtype)
    # A factor on the input is the same factor on a projection of it, which is linear.
    on_input = spec.router.weight_on == "input"
    input_weights, output_weights = (weights_TE1, 1) if on_input else (1, weights_TE1)

    def up(w_EDF, b_EF):
        projected_TEF = einsum("td,edf->tef", x_TD, w_EDF) * input_weights
        return projected_TEF if b_EF is None else projected_TEF + b_EF

    gate_TEF = None if params.w_gate_EDF is None else up(params.w_gate_EDF, params.b_gate_EF)
    hidden_TEF = hide(gate_TEF, up(params.w_up_EDF, params.b_up_EF), spec.experts)
    # Selected, not multiplied by 0: an expert that was not asked may overflow.
    weighed_TEF = jnp.where(routed_TE1, hidden_TEF * output_weights, 0)
    routed_TD = einsum("tef,efd->td", weighed_TEF, params.w_down_EFD)
    if params.b_down_ED is None:
        return routed_TD
    return routed_TD + einsum("te,ed->td", jnp.where(routed_TE1, output_weights, 0)[:, :, 0], params.b_down_ED)


def _by_expert(decided: RouteOutput, num_experts: int, dtype) -> tuple[jax.Array, jax.Array]:
    """(T, E, 1) whether a token visits each expert, and with which weight."""
    is_expert_TKE = decided.expert_ids_TK[:, :, None] == jnp.arange(num_experts)
    weights_TE = jnp.where(is_expert_TKE, decided.weights_TK[:, :, None], 0).sum(axis=1)
    return is_expert_TKE.any(axis=1)[:, :, None], weights_TE[:, :, None].astype(dtype)
