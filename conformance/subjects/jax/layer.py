"""conformance, a subject: moe_jax on the default JAX platform."""

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.subject import Routing, Unsupported
from conformance.subjects.jax.balance import JaxBalance
from conformance.subjects.jax.balance import narrow as _narrow
from moe_jax import routing
from moe_jax.replay import capture
from moe_jax.sparse_matmul import RouteMetadata, activate, gmm_down, gmm_up, permute, sparse_matmul, unpermute
from moe_ref import LayerParams, LayerSpec, RouterInputs, RouterSpec

# The spec is static: one program for each spec and shape.
_route = jax.jit(routing.route, static_argnames="spec")
_gate = jax.jit(routing.gate)
_permute = jax.jit(permute, static_argnames="num_experts")


class Jax(JaxBalance):
    """`moe_jax.routing` and `moe_jax.sparse_matmul`, compiled."""

    name = "jax"
    version = jax.__version__
    url = "https://github.com/jax-ml/jax"
    logit_dtypes = ("float32", "bfloat16")
    compiles = True

    def route(self, logits_TE, spec, expert_bias_E, *, learned_scale=None, token_mask_T=None, **inputs):
        """Route on the default device; the seed becomes a key where the selector draws."""
        if expert_bias_E is None and spec.selector == "top_k":
            expert_bias_E = np.zeros(spec.num_choices, np.float32)  # one program less to compile
        found = _route(
            _narrow(logits_TE),
            spec=spec,
            expert_bias_E=_narrow(expert_bias_E),
            learned_scale=_narrow(learned_scale),
            inputs=_inputs(spec, inputs),
            token_mask_T=token_mask_T,
        )
        return Routing(
            expert_ids_TK=np.asarray(found.expert_ids_TK),
            weights_TK=np.asarray(found.weights_TK),
            scores_TE=_numpy(found.scores_TE),
            group_ids_TL=_numpy(found.group_ids_TL),
            shared_weights_TS=_numpy(found.shared_weights_TS),
        )

    def gate(self, x_TD, gate_ED, gate_bias_E):
        """The logits, summed in float32."""
        return np.asarray(_gate(_narrow(x_TD), _narrow(gate_ED), _narrow(gate_bias_E)))

    def configure(self, fields):
        """moe_jax takes the reference's own RouterSpec."""
        RouterSpec.from_dict(fields)

    def permute(self, expert_ids_TK, num_experts):
        """Its rows are all slots; those of the tail, which belong to no expert, are left off here."""
        found = _permute(_narrow(expert_ids_TK), num_experts=num_experts)
        counts_E = np.asarray(found.group_sizes_E)
        return np.asarray(found.slot_of_row_R)[: counts_E.sum()], counts_E

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        """Both projections and the activation between them."""
        return np.asarray(_experts(_narrow(rows_RD), _narrow(tokens_per_expert_E), _narrow_params(params), spec=spec))

    def combine(self, rows_ND, order_N, weights_TK, spec):
        """The weighted sum; slots that are no row become a tail of NaN, which it does not read."""
        T, K = weights_TK.shape
        slot_of_row_R = np.concatenate([order_N, np.setdiff1d(np.arange(T * K), order_N)])
        rows_RD = np.full((T * K, rows_ND.shape[1]), np.nan)
        rows_RD[: len(order_N)] = rows_ND
        metadata = RouteMetadata(
            group_sizes_E=_narrow([len(order_N)]),
            slot_of_row_R=_narrow(slot_of_row_R),
            row_of_slot_TK=_narrow(np.argsort(slot_of_row_R).reshape(T, K)),
        )
        return np.asarray(_combine(_narrow(rows_RD), metadata, _narrow(weights_TK), spec=spec))

    def layer(self, x_TD, params, spec, **inputs):
        """`sparse_matmul`, whose second output, the routing, is not read."""
        named, limits = _layer_inputs(spec, **inputs)
        return np.asarray(_layer(_narrow(x_TD), _with_bias(params, spec), spec=spec, inputs=named, **limits))

    def layer_gradients(self, x_TD, params, spec, d_output_TD, **inputs):
        """By `jax.grad` of the sum of output times d_output."""
        named, limits = _layer_inputs(spec, **inputs)
        d_x_TD, d_params = _layer_gradients(
            _narrow(x_TD), _with_bias(params, spec), _narrow(d_output_TD), spec=spec, inputs=named, **limits
        )
        found = {"x_TD": np.asarray(d_x_TD)}
        for field in fields(LayerParams):
            if getattr(params, field.name) is not None:
                found[field.name] = np.asarray(getattr(d_params, field.name))
        return found

    def record(self, x_TD, params, spec, **inputs):
        """What `sparse_matmul` decided."""
        named, limits = _layer_inputs(spec, **inputs)
        decided = _decided(_narrow(x_TD), _with_bias(params, spec), spec=spec, inputs=named, **limits)
        return capture(decided, spec.router, token_mask_T=inputs.get("token_mask_T"))

    def replay(self, x_TD, params, spec, record):
        """`sparse_matmul` with the spec of a replay; a balancing bias takes part in a choice alone."""
        with_weights = record.weights_TK is not None
        forced = spec.replace(router=spec.router.given(with_weights=with_weights))
        inputs, mask_T = record.inputs(spec.router, with_weights=with_weights)
        named = {"token_mask_T": mask_T, "inputs": inputs}
        params = _narrow_params(replace(params, expert_bias_E=None))
        return np.asarray(_layer(_narrow(x_TD), params, spec=forced, inputs=named))


STATIC = ("spec", "capacity", "num_sequences")


@partial(jax.jit, static_argnames=STATIC)
def _layer(x_TD, params: LayerParams, *, spec: LayerSpec, inputs: dict, **limits):
    return sparse_matmul(x_TD, params, spec, **inputs, **limits)[0]


@partial(jax.jit, static_argnames=STATIC)
def _decided(x_TD, params: LayerParams, *, spec: LayerSpec, inputs: dict, **limits):
    return sparse_matmul(x_TD, params, spec, **inputs, **limits)[1]


@partial(jax.jit, static_argnames=STATIC)
def _layer_gradients(x_TD, params: LayerParams, d_output_TD, *, spec: LayerSpec, inputs: dict, **limits):
    def loss(x_TD, params):
        return jnp.sum(sparse_matmul(x_TD, params, spec, **inputs, **limits)[0] * d_output_TD)

    return jax.grad(loss, argnums=(0, 1))(x_TD, params)


@partial(jax.jit, static_argnames="spec")
def _experts(rows_RD, tokens_per_expert_E, params: LayerParams, *, spec: LayerSpec):
    slots_R = jnp.arange(len(rows_RD), dtype=jnp.int32)
    metadata = RouteMetadata(
        group_sizes_E=tokens_per_expert_E, slot_of_row_R=slots_R, row_of_slot_TK=slots_R[:, None]
    )  # fmt: skip
    gate_RF, up_RF = gmm_up(rows_RD, params.w_gate_EDF, params.w_up_EDF, metadata)
    hidden_RF = activate(gate_RF, up_RF, params, metadata, spec.experts)
    return gmm_down(hidden_RF, params.w_down_EFD, params.b_down_ED, metadata)


@partial(jax.jit, static_argnames="spec")
def _combine(rows_RD, metadata: RouteMetadata, weights_TK, *, spec: LayerSpec):
    # A weight that is on the input is not applied again.
    summed_TD = unpermute(rows_RD, metadata, weights_TK if spec.router.weight_on == "output" else None)
    return summed_TD * spec.router.output_scale


def _layer_inputs(
    spec: LayerSpec, *, token_mask_T=None, capacity=None, sequence_lengths=None, tokens_per_shard=None, **inputs
) -> tuple[dict, dict]:
    """Keyword arguments of `sparse_matmul`: those that are arrays, and those of a capacity."""
    if tokens_per_shard is not None:
        raise Unsupported("a layer of moe_jax is on one rank, and has no shards")
    limits = {} if capacity is None else {"capacity": capacity}
    if sequence_lengths is not None:
        sequence_of_T = np.repeat(np.arange(len(sequence_lengths)), sequence_lengths)
        limits |= {"sequence_of_T": _narrow(sequence_of_T), "num_sequences": len(sequence_lengths)}
    return {"token_mask_T": token_mask_T, "inputs": _inputs(spec.router, inputs)}, limits


def _inputs(spec: RouterSpec, named: dict) -> RouterInputs:
    """The inputs by name as one object; the seed becomes a key where the selector draws."""
    inputs = RouterInputs(**named).map(_narrow)
    return replace(inputs, seed=jax.random.key(inputs.seed or 0)) if spec.selector == "random" else inputs


def _narrow_params(params: LayerParams) -> LayerParams:
    values: dict = {field.name: _narrow(getattr(params, field.name)) for field in fields(LayerParams)}
    return LayerParams(**values)


def _with_bias(params: LayerParams, spec: LayerSpec) -> LayerParams:
    """No balancing bias is one of zeros: one program less to compile."""
    if params.expert_bias_E is None and spec.router.selector == "top_k":
        params = replace(params, expert_bias_E=np.zeros(spec.router.num_choices))
    return _narrow_params(params)


def _numpy(array):
    return None if array is None else np.asarray(array)
