"""conformance, subject maxtext: its RoutedMoE and RoutedAndSharedMoE on one device, compiled, and their stages."""

from functools import lru_cache
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.inputs import LayerInputs
from conformance.core.subject import Subject, Unsupported
from conformance.subjects.maxtext.module import FLOAT32, Built, gradients_of, routed, scope
from conformance.subjects.maxtext.settings import settings_of
from moe_ref import CapacitySpec, ExpertSpec, LayerParams, LayerSpec, RouterSpec, RoutingRecord, ShardLayout

MIXTRAL: dict[str, Any] = {"score_over": "selected", "select_by": "logit"}
"""Of a router whose one weight is 1."""
DEEPSEEK: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20}
"""Likewise, but for a part in 2 ** 23."""


class MaxtextLayer(Subject):
    """`sparse_matmul`, or `dense_matmul` where its entries ask for it (`sparse_matmul=False`)."""

    entries: ClassVar[dict[str, Any]] = FLOAT32

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        settings_of(spec)  # a ValueError is the sentence
        return None if layout is None else "maxtext is judged over a mesh as maxtext-layouts"

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """`permute` with a top k that is known; its rows are all slots."""
        K = expert_ids_TK.shape[1]
        if (np.asarray(expert_ids_TK) < 0).any() or (np.asarray(expert_ids_TK) >= num_experts).any():
            raise Unsupported("maxtext's permute has a row for each slot: it spreads the unused ones over the experts")
        spec = LayerSpec(
            router=RouterSpec(num_experts=num_experts, top_k=K, **MIXTRAL), experts=ExpertSpec(dim=1, hidden_dim=1)
        )
        built = built_layer(spec, False, tuple(self.entries.items()))
        with scope(built.mesh):
            order_N, counts_E = _permute(built)(jnp.asarray(expert_ids_TK, jnp.int32))
        return np.asarray(order_N), np.asarray(counts_E)

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        """The layer with top_k 1, whose tokens are the rows, forced to their experts; a tail is the last expert's."""
        E, R = spec.router.num_experts, len(rows_RD)
        clamped = spec.experts.clamp is not None and spec.experts.alpha == 1
        router = RouterSpec(num_experts=E, top_k=1, **(DEEPSEEK if clamped else MIXTRAL))
        bare = LayerSpec(router=router, experts=spec.experts)
        ids_R = np.repeat(np.arange(E), tokens_per_expert_E)
        ids_R1 = np.concatenate([ids_R, np.full(R - len(ids_R), E - 1)])[:, None]
        gate_ED = np.zeros((E, spec.experts.dim))
        names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD", "b_gate_EF", "b_up_EF", "b_down_ED")
        own: Any = {name: getattr(params, name) for name in names}
        return self._run(rows_RD, LayerParams(gate_ED=gate_ED, **own), bare, forced_TK=ids_R1)

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """`unpermute`."""
        T, K = weights_TK.shape
        if len(order_N) != T * K:
            raise Unsupported("maxtext's unpermute has a row for each slot")
        built = built_layer(spec, False, tuple(self.entries.items()))
        with scope(built.mesh):
            return np.asarray(
                _combine(built)(jnp.asarray(rows_ND), jnp.asarray(order_N, jnp.int32), jnp.asarray(weights_TK)),
                np.float32,
            )

    def layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> np.ndarray:
        """The module as a decoder calls it."""
        return self._run(x_TD, params, spec, **_how(len(x_TD), spec, inputs))

    def layer_gradients(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        d_output_TD: np.ndarray,
        **inputs: Unpack[LayerInputs],
    ) -> dict[str, np.ndarray]:
        """By `jax.grad` of the sum of output times d_output, inside its custom rules."""
        how = _how(len(x_TD), spec, inputs)
        built, x_BSD, arrays = self._prepared(x_TD, params, spec, **how)
        d_output_BSD = jnp.asarray(np.reshape(d_output_TD, x_BSD.shape), jnp.float32)
        with scope(built.mesh):
            d_x_BSD, d_leaves = _gradients(built)(built.leaves(params, how["table_VK"]), x_BSD, d_output_BSD, arrays)
        return {"x_TD": np.asarray(d_x_BSD, np.float32).reshape(x_TD.shape)} | gradients_of(d_leaves, params)

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record: RoutingRecord) -> np.ndarray:
        """`forced_routed_experts`."""
        if record.weights_TK is not None:
            raise Unsupported("maxtext forces ids, whose weights are its own")
        if not record.token_mask_T.all():
            raise Unsupported("maxtext has no padding mask")
        return self._run(x_TD, params, spec, forced_TK=record.expert_ids_TK)

    def _run(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **how: Any) -> np.ndarray:
        built, x_BSD, arrays = self._prepared(x_TD, params, spec, **how)
        with scope(built.mesh):
            output_BSD = _layer(built)(built.leaves(params, how.get("table_VK")), x_BSD, arrays)
        return np.asarray(output_BSD, np.float32).reshape(x_TD.shape)

    def _prepared(
        self, x_TD, params: LayerParams, spec: LayerSpec, *, forced_TK=None, token_ids_T=None, table_VK=None,
        factor: float | None = None, num_sequences: int = 1,
    ):  # fmt: skip
        """The module, the tokens as batch and sequence, and the further arrays of its call."""
        if factor is not None and self.entries.get("sparse_matmul", True):
            raise Unsupported("maxtext drops tokens in dense_matmul alone, which is maxtext-dense")
        entries = self.entries | ({} if factor is None else {"capacity_factor": factor})
        built = built_layer(spec, params.expert_bias_E is not None, tuple(entries.items()))
        B, (T, D) = num_sequences, x_TD.shape
        x_BSD = jnp.asarray(np.reshape(x_TD, (B, T // B, D)), jnp.float32)
        rows = {"forced_routed_experts": forced_TK, "input_ids": token_ids_T}
        arrays = {
            name: jnp.asarray(np.reshape(rows_T, (B, T // B, *np.shape(rows_T)[1:])), jnp.int32)
            for name, rows_T in rows.items()
            if rows_T is not None
        }
        return built, x_BSD, arrays


def why_not_capacity(capacity: CapacitySpec) -> str | None:
    """A sentence that says what MaxText's capacity has not, or None."""
    if (capacity.drop_order, capacity.renormalise, capacity.then) != ("first_come", "no", None):
        return "maxtext's capacity takes slots first come, keeps weights as they are, and is one"
    return "maxtext's capacity is of each sequence, not of a rank" if capacity.scope == "rank" else None


def factor_of(capacity: CapacitySpec, num_tokens: int, top_k: int, num_experts: int) -> float:
    """The capacity_factor with which int(factor * ceil(T * K / E)) is this capacity, for a sequence of T tokens."""
    if capacity.rounding == "ceil_then_floor" and not capacity.min_slots and capacity.factor is not None:
        return capacity.factor
    balanced = max(1, -(-num_tokens * top_k // num_experts))
    # In the middle between two whole numbers, so that no rounding matters.
    return (capacity.capacity(num_tokens, top_k, num_experts) + 0.5) / balanced


def sequences_of(num_tokens: int, lengths: Any) -> int:
    """How many sequences a batch has, which are equally long.

    Raises:
        Unsupported: they are not.
    """
    lengths = [num_tokens] if lengths is None else list(lengths)
    if len(set(lengths)) != 1:
        raise Unsupported("the sequences of a batch of maxtext are equally long")
    return len(lengths)


def _how(num_tokens: int, spec: LayerSpec, inputs: LayerInputs) -> dict[str, Any]:
    """Arguments of `_prepared`, from further inputs."""
    if inputs.get("token_mask_T") is not None:
        raise Unsupported("maxtext has no padding mask")
    if inputs.get("given_weights_TK") is not None:
        raise Unsupported("maxtext forces ids, whose weights are its own")
    if spec.router.selector == "random":
        raise Unsupported("a layer of maxtext draws from a stream of its own")
    capacity, how = inputs.get("capacity"), {}
    lengths = inputs.get("sequence_lengths")
    B = how["num_sequences"] = sequences_of(num_tokens, lengths)
    if capacity is not None:
        if why := why_not_capacity(capacity):
            raise Unsupported(why)
        if capacity.scope == "global":
            B = how["num_sequences"] = 1
        how["factor"] = factor_of(capacity, num_tokens // B, spec.router.top_k, spec.router.num_experts)
    return how | {
        "forced_TK": inputs.get("given_ids_TK"),
        "token_ids_T": inputs.get("token_ids_T"),
        "table_VK": inputs.get("table_VK"),
    }


@lru_cache(maxsize=256)
def built_layer(spec: LayerSpec, expert_bias: bool, entries: tuple, axes: tuple = ()) -> Built:
    """The module of a spec, on a mesh of these axes."""
    return Built.of(spec, dict(entries), expert_bias=expert_bias, axes=dict(axes))


@lru_cache(maxsize=256)
def _layer(built: Built):
    return jax.jit(lambda leaves, x_BSD, arrays: built.module(leaves)(x_BSD, **arrays)[0])


@lru_cache(maxsize=256)
def _gradients(built: Built):
    def loss(x_BSD, leaves, d_output_BSD, arrays):
        output_BSD = built.module(leaves)(x_BSD, **arrays)[0]
        return jnp.sum(output_BSD.astype(jnp.float32) * d_output_BSD)

    grad = jax.grad(loss, argnums=(0, 1))
    return jax.jit(lambda leaves, x_BSD, d_output_BSD, arrays: grad(x_BSD, leaves, d_output_BSD, arrays))


@lru_cache(maxsize=256)
def _permute(built: Built):
    @jax.jit
    def run(ids_TK):
        module = routed(built.module({}))
        T, K = ids_TK.shape
        x_1TD, ones_1TK = jnp.zeros((1, T, 1), module.dtype), jnp.ones((1, T, K), module.dtype)
        found = module.permute(x_1TD, None, None, precomputed_topk=(ones_1TK, ids_TK[None]), compute_lb_loss=False)
        return found[1], found[3]

    return run


@lru_cache(maxsize=256)
def _combine(built: Built):
    @jax.jit
    def run(rows_ND, order_N, weights_TK):
        module = routed(built.module({}))
        return module.unpermute(rows_ND.astype(module.dtype), order_N, weights_TK[None], 1, len(weights_TK))[0]

    return run
