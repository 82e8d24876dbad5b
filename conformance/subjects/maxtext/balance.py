"""conformance, subject maxtext: load, balance loss, bias update and capacity of maxtext.layers.moe, as they are.

A loss is that which RoutedMoE returns beside its output, for ids that are forced on it. With a balancing bias the
module is that of DeepSeek-V3, which alone has one; without, a plain router that scores by softmax is mixtral's. Several
shards are devices on its axis `data`, each with whole sequences.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.subject import LoadRule, Subject, Unsupported
from conformance.subjects.maxtext.layer import DEEPSEEK, MIXTRAL, built_layer, factor_of, sequences_of, why_not_capacity
from conformance.subjects.maxtext.module import BIAS, FLOAT32, Built, moe, scope
from moe_ref import (
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    ExpertSpec,
    LayerSpec,
    QuantileSpec,
    RouterSpec,
    SparsitySpec,
)
from moe_ref.specs.balance import RUNNING_SCOPES

MEGATRON: dict[str, Any] = {"score_func": "sigmoid", "norm_scores": True, "score_eps": 1e-20, "counts": "unbiased"}
"""Its loss of a sigmoid router, where it is asked for."""


class MaxtextBalance(Subject):
    """What it does about the load of experts; it has no z-loss and no padding. A batch is one sequence of it."""

    entries: ClassVar[dict[str, Any]] = FLOAT32

    def supports_load(self, spec: LoadRule) -> str | None:
        if isinstance(spec, QuantileSpec):
            return "maxtext has no quantile balancing"
        if isinstance(spec, SparsitySpec):
            return "maxtext has no routing whose numbers of experts vary"
        if isinstance(spec, CapacitySpec):
            return why_not_capacity(spec)
        if isinstance(spec, BiasUpdateSpec):
            plain = BiasUpdateSpec(rate=spec.rate)
            return None if spec == plain and spec.rate > 0 else "maxtext moves every bias by rate * sign(mean - count)"
        if spec.coeff == 0:
            return "maxtext has no loss where its weight is 0"
        plain = BalanceSpec(coeff=spec.coeff, per=spec.per, scope=spec.scope)
        sigmoid = plain.replace(**MEGATRON | {"score_eps": spec.score_eps})
        if spec not in (plain, sigmoid) or spec.scope in RUNNING_SCOPES or spec.score_eps not in (0, 1e-20):
            return "maxtext's loss is of softmax scores with the routed counts, or that of Megatron's sigmoid router"
        return None

    def load(self, expert_ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
        """`calculate_expert_counts`."""
        count = jax.jit(moe.calculate_expert_counts, static_argnums=1)
        return np.asarray(count(jnp.asarray(expert_ids_TK, jnp.int32), num_experts))

    def balance_loss(
        self,
        logits_TE: np.ndarray,
        expert_ids_TK: np.ndarray,
        balance: BalanceSpec,
        router: RouterSpec,
        *,
        expert_bias_E: np.ndarray | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> dict[str, Any]:
        """The loss of all sequences, and its gradient by the logits, which an identity gate takes."""
        if router.num_null_experts or router.scales_logits:
            raise Unsupported("maxtext scores the logits as they are, and has no null experts")
        B = 1 if balance.per == "batch" else sequences_of(len(logits_TE), sequence_lengths)
        S = sequences_of(len(logits_TE), tokens_per_shard)
        if balance.scope == "local" and B < 2:
            B = S  # the part of the sequence on a shard is a sequence of it
        if B % S or len(jax.devices()) < S:
            raise Unsupported("a shard of maxtext holds whole sequences")
        megatron = balance.norm_scores
        plain = RouterSpec(num_experts=router.num_experts, top_k=router.top_k)
        if router == plain and expert_bias_E is None:
            router = plain.replace(**MIXTRAL)
        elif router == plain.replace(score_func="sigmoid"):
            router = router.replace(**DEEPSEEK)
        spec = LayerSpec(router=router, experts=ExpertSpec(dim=router.num_experts, hidden_dim=1))
        entries = self.entries | {
            "load_balance_loss_weight": balance.coeff, "moe_use_megatron_seq_aux_loss": megatron
        }  # fmt: skip
        built = built_layer(spec, expert_bias_E is not None, tuple(entries.items()), (("data", S),))
        leaves = {} if expert_bias_E is None else {BIAS: jnp.asarray(expert_bias_E, jnp.float32)}
        logits_BSE = jnp.asarray(np.reshape(logits_TE, (B, -1, router.num_experts)), jnp.float32)
        ids_BSK = jnp.asarray(np.reshape(expert_ids_TK, (B, -1, router.top_k)), jnp.int32)
        with scope(built.mesh, identity_gate=True):
            loss, d_logits_BSE = _loss(built)(leaves, logits_BSE, ids_BSK)
        return {"loss": float(loss), "d_logits_TE": np.asarray(d_logits_BSE, np.float32).reshape(logits_TE.shape)}

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """What is left to do after a layer that did not sum its counts (`defer_small_all_reduces`), and the sum."""
        config = SimpleNamespace(gradient_accumulation_steps=1, routed_bias_update_rate=update.rate)
        counts_S1E = jnp.asarray(counts_SE, jnp.int32)[:, None]
        update_E = jax.jit(lambda counts: moe.finalize_deferred_bias_signal(counts, config))(counts_S1E)
        return np.asarray(jnp.asarray(expert_bias_E, jnp.float32) + update_E)

    def capacity(
        self,
        expert_ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        capacity: CapacitySpec,
        num_experts: int,
        *,
        sequence_lengths: tuple[int, ...] | None = None,
        d_weights_TK: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """`reshape_and_update_weights` and `generate_masks`, whose combine mask holds the weights that are kept."""
        (T, K), B = expert_ids_TK.shape, sequences_of(len(expert_ids_TK), sequence_lengths)
        B = 1 if capacity.scope == "global" else B
        if (np.asarray(expert_ids_TK) < 0).any() or (np.asarray(expert_ids_TK) >= num_experts).any():
            raise Unsupported("maxtext's masks are of routers without unused slots and null experts")
        spec = LayerSpec(
            router=RouterSpec(num_experts=num_experts, top_k=K, **MIXTRAL), experts=ExpertSpec(dim=1, hidden_dim=1)
        )
        entries = self.entries | {
            "capacity_factor": factor_of(capacity, T // B, K, num_experts),
            "sparse_matmul": False,
        }
        built = built_layer(spec, False, tuple(entries.items()))
        ids_BSK = jnp.asarray(np.reshape(expert_ids_TK, (B, T // B, K)), jnp.int32)
        weights_BSK = jnp.asarray(np.reshape(weights_TK, ids_BSK.shape), jnp.float32)
        d_BSK = jnp.zeros_like(weights_BSK) if d_weights_TK is None else jnp.reshape(d_weights_TK, ids_BSK.shape)
        with scope(built.mesh):
            kept_TK, kept_weights_TK, d_given_TK = (
                np.asarray(each, np.float32).reshape(T, K)
                for each in _masks(built)(ids_BSK, weights_BSK, jnp.asarray(d_BSK, jnp.float32))
            )
        found = {"expert_ids_TK": np.where(kept_TK > 0, expert_ids_TK, -1), "weights_TK": kept_weights_TK}
        return found if d_weights_TK is None else found | {"d_weights_TK": d_given_TK}


@lru_cache(maxsize=128)
def _loss(built: Built):
    def loss(logits_BSE, leaves, ids_BSK):
        return built.module(leaves)(logits_BSE, forced_routed_experts=ids_BSK)[1]

    grad = jax.value_and_grad(loss)
    return jax.jit(lambda leaves, logits_BSE, ids_BSK: grad(logits_BSE, leaves, ids_BSK))


@lru_cache(maxsize=128)
def _masks(built: Built):
    @jax.jit
    def run(ids_BSK, weights_BSK, d_weights_BSK):
        module = built.module({})

        def kept(weights_BSK):
            weights_BSE = module.reshape_and_update_weights(weights_BSK, ids_BSK)
            dispatch_BSEC, combine_BSEC = module.generate_masks(ids_BSK, weights_BSE)
            weights = jnp.take_along_axis(combine_BSEC.sum(axis=-1), ids_BSK, axis=-1)
            return weights, jnp.take_along_axis(dispatch_BSEC.any(axis=-1), ids_BSK, axis=-1)

        kept_weights_BSK, pull, is_kept_BSK = jax.vjp(kept, weights_BSK, has_aux=True)
        return is_kept_BSK, kept_weights_BSK, pull(d_weights_BSK.astype(kept_weights_BSK.dtype))[0]

    return run
