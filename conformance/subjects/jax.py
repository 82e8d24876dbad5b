"""conformance, a subject: moe_jax on the default JAX platform."""

import jax
import jax.numpy as jnp
import numpy as np

from conformance.subject import Routing, Subject
from moe_jax import routing
from moe_ref import RouterSpec

# The spec is static: one program for each spec and shape.
_route = jax.jit(routing.route, static_argnames="spec")
_gate = jax.jit(routing.gate)


class Jax(Subject):
    """`moe_jax.routing`, compiled."""

    name = "jax"
    version = jax.__version__
    url = "https://github.com/jax-ml/jax"
    logit_dtypes = ("float32", "bfloat16")
    compiles = True

    def route(
        self,
        logits_TE,
        spec,
        expert_bias_E,
        *,
        learned_scale=None,
        token_ids_T=None,
        table_VK=None,
        given_ids_TK=None,
        token_mask_T=None,
        seed=0,
    ):
        """Route on the default device; the seed becomes a key where the selector draws."""
        if expert_bias_E is None and spec.selector == "top_k":
            expert_bias_E = np.zeros(spec.num_choices, np.float32)  # one program less to compile
        found = _route(
            _narrow(logits_TE),
            spec=spec,
            expert_bias_E=_narrow(expert_bias_E),
            learned_scale=_narrow(learned_scale),
            token_ids_T=_narrow(token_ids_T),
            table_VK=_narrow(table_VK),
            given_ids_TK=_narrow(given_ids_TK),
            token_mask_T=token_mask_T,
            key=jax.random.key(seed) if spec.selector == "random" else None,
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


def _narrow(array):
    """float64 and int64 become their 32-bit kinds, as everywhere in JAX without jax_enable_x64."""
    if array is None:
        return None
    array = np.asarray(array)
    narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    return jnp.asarray(array, dtype=narrow.get(array.dtype, array.dtype))


def _numpy(array):
    return None if array is None else np.asarray(array)
