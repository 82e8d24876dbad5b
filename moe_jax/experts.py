"""moe_jax, experts: what one expert computes, and what stands beside the routed experts.

Legend: T tokens, D model dim, E experts, F expert hidden dim, K top_k, S shared experts.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec


def hide(gate: jax.Array | None, up: jax.Array, spec: ExpertSpec) -> jax.Array:
    """The activation applies to the gate half alone, or to the up projection where there is no gate.

    Computed in float32 at least. At a kink: relu has slope 0 at 0; a clamp passes the gradient of a value at its limit.

    Args:
        gate: (..., F), or None where experts are not gated.
        up: (..., F).
    """
    dtype = jnp.promote_types(up.dtype, jnp.float32)
    if gate is None:
        return _activated(up.astype(dtype), spec).astype(up.dtype)
    return (_activated(gate.astype(dtype), spec) * _clamped_up(up.astype(dtype), spec)).astype(up.dtype)


def _activated(z, spec: ExpertSpec):
    """The activation's input is clamped from above before it, or its output after it."""
    if spec.clamp is None:
        return _activation(z, spec)
    if spec.clamp_at == "before":
        return _activation(_at_most(z, spec.clamp), spec)
    return _at_most(_activation(z, spec), spec.clamp)


def _clamped_up(up, spec: ExpertSpec):
    """The up half is clamped on both sides, or softly by a tanh, then offset."""
    clamped = up if spec.clamp is None else -_at_most(-_at_most(up, spec.clamp), spec.clamp)
    if spec.linear_beta is not None:
        clamped = spec.linear_beta * jnp.tanh(clamped / spec.linear_beta)
    return clamped + spec.up_offset


def _at_most(z, limit: float):
    # jnp.minimum halves the gradient where z equals the limit.
    return jnp.where(z > limit, limit, z)


def _activation(z, spec: ExpertSpec):
    if spec.activation == "silu":
        return z * jax.nn.sigmoid(spec.alpha * z)
    if spec.activation == "gelu":
        return z * _normal_cdf(z)
    if spec.activation == "gelu_tanh":
        return jax.nn.gelu(z, approximate=True)
    if spec.activation == "situ":
        return spec.beta * jnp.tanh(z / spec.beta) * jax.nn.sigmoid(z)
    rectified = jax.nn.relu(z)
    return rectified if spec.activation == "relu" else jnp.square(rectified)


@jax.custom_jvp
def _normal_cdf(z):
    # jax.nn.gelu would do, but for its derivative: that of erfc raises inside shard_map with jax 0.12.0.1, where a
    # primitive of it asks for coefficients that vary over the mesh as z does.
    return 0.5 * lax.erfc(-math.sqrt(0.5) * z)


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _normal_cdf(z), jnp.exp(-0.5 * jnp.square(z)) / math.sqrt(2 * math.pi) * dz


def null_output(
    x_TD: jax.Array, expert_ids_TK: jax.Array, weights_TK: jax.Array, params: LayerParams, spec: RouterSpec
) -> jax.Array | int:
    """An identity null expert adds its weight times its input, a constant one its mixture; others add nothing."""
    output_TD, ids = 0, spec.identity_ids
    if len(ids):
        is_identity_TK = (expert_ids_TK >= ids.start) & (expert_ids_TK < ids.stop)
        weight_T = jnp.where(is_identity_TK, weights_TK, 0).sum(axis=-1)
        output_TD = weight_T[:, None].astype(x_TD.dtype) * x_TD
    for z in range(spec.num_constant_experts):
        is_own_TK = expert_ids_TK == spec.num_experts + z
        weight_T1 = jnp.where(is_own_TK, weights_TK, 0).sum(axis=-1)[:, None].astype(x_TD.dtype)
        output_TD = output_TD + _constant_output(x_TD, is_own_TK, weight_T1, z, params, spec)
    return output_TD


def _constant_output(x_TD, is_own_TK, weight_T1, z: int, params: LayerParams, spec: RouterSpec):
    """weight * (a1 * x + a2 * v) of one constant expert, or that of weight * x; 0 for tokens that did not choose it."""
    assert params.constant_w_ZD2 is not None
    assert params.constant_ZD is not None
    on_input = spec.weight_on == "input"
    seen_TD = weight_T1 * x_TD if on_input else x_TD
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    a_T2 = jax.nn.softmax(jnp.matmul(seen_TD, params.constant_w_ZD2[z]).astype(wide)).astype(x_TD.dtype)
    mixed_TD = a_T2[:, :1] * seen_TD + a_T2[:, 1:] * jnp.asarray(params.constant_ZD[z])[None]
    return jnp.where(is_own_TK.any(axis=-1)[:, None], mixed_TD if on_input else weight_T1 * mixed_TD, 0)


def shared_output(
    x_TD: jax.Array,
    shared_weights_TS: jax.Array | None,
    params: LayerParams,
    spec: LayerSpec,
    *,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Each shared expert works on every token; its factor is the router's weight, a sigmoid of the token, or 1."""
    assert spec.shared_experts is not None
    assert params.shared_w_up_SDF is not None
    assert params.shared_w_down_SFD is not None
    output_TD = jnp.zeros_like(x_TD)
    for shared_id in range(spec.num_shared_experts):
        gate_TF = None
        if params.shared_w_gate_SDF is not None:
            gate_TF = jnp.matmul(x_TD, params.shared_w_gate_SDF[shared_id], precision=precision)
        up_TF = jnp.matmul(x_TD, params.shared_w_up_SDF[shared_id], precision=precision)
        hidden_TF = hide(gate_TF, up_TF, spec.shared_experts)
        one_output_TD = jnp.matmul(hidden_TF, params.shared_w_down_SFD[shared_id], precision=precision)
        if shared_weights_TS is not None:
            one_output_TD *= shared_weights_TS[:, shared_id, None].astype(x_TD.dtype)
        elif params.shared_token_gate_D is not None:
            # A score, as those of the router: float32 whatever the platform's default precision.
            token_gate_T = jnp.matmul(x_TD, params.shared_token_gate_D, precision=lax.Precision.HIGHEST)
            one_output_TD *= jax.nn.sigmoid(token_gate_T)[:, None]
        output_TD += one_output_TD
    return output_TD


def join(
    routed_TD: jax.Array,
    x_TD: jax.Array,
    shared_weights_TS: jax.Array | None,
    params: LayerParams,
    spec: LayerSpec,
    *,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """The layer's output is the sum, or the average, of routed and shared output."""
    if spec.shared is None:
        return routed_TD
    joined_TD = routed_TD + shared_output(x_TD, shared_weights_TS, params, spec, precision=precision)
    return joined_TD / 2 if spec.shared.combine == "average" else joined_TD


def keep_tokens(values_TD: jax.Array, token_mask_T: jax.Array | None) -> jax.Array:
    """Rows of padding tokens are 0, whatever they held, and so are their gradients."""
    # 0 * NaN is NaN: a padding row is replaced, not multiplied by a mask.
    return values_TD if token_mask_T is None else jnp.where(jnp.asarray(token_mask_T)[:, None], values_TD, 0)
