"""moe_jax, the fused form: shared experts in slots of their own behind the routed ones (`moe_ref/specs/fused.py`).

Legend: T tokens, K top_k, S slots of shared experts, D model dim, E routed experts.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.experts import keep_tokens
from moe_jax.permute import permute
from moe_jax.sparse_matmul import RouteOutput, route_tokens, run_experts
from moe_jax.tokens import flat, flat_tokens, like_tokens
from moe_ref.specs.fused import fused_spec, fused_weight, num_fused
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


def fuse_routing(
    expert_ids_TK: jax.Array, weights_TK: jax.Array, spec: LayerSpec, *, token_mask_T: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(T, K + S) ids and weights: E .. E+S-1 behind a token's own, with the weight of 1 / output_scale. [LAY-25]"""
    T, S = expert_ids_TK.shape[0], num_fused(spec)
    valid_T1 = jnp.ones((T, 1), bool) if token_mask_T is None else token_mask_T[:, None]
    ids_TS = jnp.where(valid_T1, spec.router.num_experts + jnp.arange(S, dtype=expert_ids_TK.dtype), UNUSED)
    weights_TS = jnp.where(valid_T1, jnp.full((T, S), fused_weight(spec), weights_TK.dtype), 0)
    return jnp.concatenate([expert_ids_TK, ids_TS], axis=1), jnp.concatenate([weights_TK, weights_TS], axis=1)


def fused_matmul(
    x: jax.Array,
    params: LayerParams,
    fused: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T: jax.Array | None = None,
    inputs: RouterInputs = NO_INPUTS,
    **options: Any,
) -> tuple[jax.Array, RouteOutput]:
    """The layer in its fused form: one grouped matmul for routed and shared experts. [LAY-25]

    Args:
        x: (T, D) tokens, or (..., D), as in `sparse_matmul`.
        params: of the router: gate, gate bias, expert bias and learned scale are read.
        fused: of the experts, `moe_ref.specs.fused.fuse_params`.
        spec: of the layer with its shared experts beside it; static.
        token_mask_T, inputs: as in `sparse_matmul`.
        options: of `run_experts`.

    Returns:
        output, of the shape of x, and what the router decided, of the E routed experts.

    Raises:
        ValueError: the layer has no fused form.
    """
    x_TD, token_mask_T = flat_tokens(x, spec), flat("token_mask_T", token_mask_T, x)
    clean_x_TD = keep_tokens(x_TD, token_mask_T)
    logits_TE = routing.gate(clean_x_TD, params.gate_ED, params.gate_bias_E, spec=spec.router)
    decided, _ = route_tokens(
        logits_TE, spec.router, expert_bias_E=params.expert_bias_E, learned_scale=params.learned_scale,
        token_mask_T=token_mask_T, inputs=inputs,
    )  # fmt: skip
    ids, weights = fuse_routing(decided.expert_ids_TK, decided.weights_TK, spec, token_mask_T=token_mask_T)
    form = fused_spec(spec)
    among = replace(decided, expert_ids_TK=ids, weights_TK=weights)
    output_TD = run_experts(clean_x_TD, fused, among, permute(ids, form.router.num_experts), spec=form, **options)
    return like_tokens(keep_tokens(output_TD.astype(clean_x_TD.dtype), token_mask_T), x), decided
