"""conformance, subject maxtext-layouts: RoutedMoE over a mesh of CPU devices.

Two parts do not run on CPUs, and have a substitute here. `jax.lax.ragged_all_to_all` is an all-gather, from which each
device takes what is sent to it (`gathered_ragged_all_to_all`). The grouped matmul of the ring, which
`jax.lax.ragged_dot` cannot be since it has no group offset, is a sum over experts that leaves rows of no local expert
0, as megablox does, and rows past all groups as poison (`masked_gmm_with`). All else is MaxText's, which GSPMD lays out
by its own axis rules.
"""

from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.subject import Subject, Unsupported
from conformance.subjects.maxtext.layer import built_layer
from conformance.subjects.maxtext.module import FLOAT32, MOST_RANKS, Built, gradients_of, moe, scope
from conformance.subjects.maxtext.settings import settings_of
from conformance.subjects.maxtext.subject import Maxtext
from moe_ref import LayerParams, LayerSpec
from moe_ref.specs.layout import ShardLayout


class MaxtextLayouts(Subject):
    """Expert, data, FSDP and tensor parallelism; ragged all-to-all, ring of experts, and a batch of one sequence."""

    name = "maxtext-layouts"
    version = Maxtext.version
    compiles = equal_shards = True
    entries: ClassVar = FLOAT32

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        if spec.router.selector != "given":  # dispatch sees the ids alone
            settings_of(spec)  # a ValueError is the sentence
        elif spec.router.num_null_experts:
            return "maxtext has no null experts"
        return None if layout is None else why_not_layout(spec, layout)

    def dispatch(
        self, expert_ids_by_shard: list[np.ndarray], layout: ShardLayout, spec: LayerSpec
    ) -> list[dict[str, Any]]:
        """Its own sizes, offsets and local order for each rank; rows are moved here as these say."""
        if layout.strategy == "replicated_ragged":
            return [plan for ids_TK in expert_ids_by_shard for plan in self._plans_of_shared(ids_TK, layout, spec)]
        if layout.strategy not in ("all_to_all", "ragged_all_to_all"):
            raise Unsupported(f"maxtext's {layout.strategy} has no plan that could be seen")
        plans = []
        hold_whole_buffer(layout, expert_ids_by_shard[0].size)
        for group in range(layout.num_rank_groups):
            ids_by_source = [expert_ids_by_shard[shard] for shard in layout.shards_of_group(group)]
            plans += self._plans_of_group(ids_by_source, layout, spec.router.num_experts)
        return plans

    def _plans_of_group(self, ids_by_source: list[np.ndarray], layout: ShardLayout, E: int) -> list[dict[str, Any]]:
        S, e, K = layout.expert, E // layout.expert, ids_by_source[0].shape[1]
        orders, counts_SE = zip(*(Maxtext().permute(ids_TK, E) for ids_TK in ids_by_source), strict=True)
        counts_SE = jnp.asarray(np.stack(counts_SE), jnp.int32)
        sent_SS = counts_SE.reshape(S, S, e).sum(axis=-1)
        factor = layout.buffer_factor or -1.0
        rows = moe.RoutedMoE.get_ragged_buffer_size(len(orders[0]), S, E, K, factor)
        how: dict[str, Any] = {"ragged_buffer_factor": factor, "buffer_size": rows}
        params = [[np.asarray(p) for p in _all_to_all(sent_SS, rank, S, **how)] for rank in range(S)]
        plans = []
        for rank in range(S):
            received = np.full((rows, 2), -1)
            for source in range(S):
                inputs, sizes, outputs, _ = (p[rank] for p in params[source])
                slots = orders[source][inputs : inputs + sizes]
                received[outputs : outputs + sizes] = np.stack([np.full(sizes, source), slots], axis=-1)
            local = moe.RoutedMoE.local_permute(
                jnp.asarray(received), counts_SE, e, rank, ragged_buffer_factor=factor, use_custom_sort_vjp=True
            )
            sizes_e = np.asarray(local[2])
            wanted = int(sent_SS[:, rank].sum())
            plans.append({
                "send_sizes_S": params[rank][1], "recv_sizes_S": params[rank][3], "group_sizes_e": sizes_e,
                "order_R2": np.asarray(local[0])[: sizes_e.sum()], "overflow": max(0, wanted - rows),
            })  # fmt: skip
        return plans

    def _plans_of_shared(self, ids_TK: np.ndarray, layout: ShardLayout, spec: LayerSpec) -> list[dict[str, Any]]:
        """Where the batch is replicated over the expert axis; what is sent is sent back."""
        S, E = layout.expert, spec.router.num_experts
        order_N, counts_E = Maxtext().permute(ids_TK, E)
        expert_N = jnp.repeat(jnp.arange(E), jnp.asarray(counts_E), total_repeat_length=len(order_N))
        sizes_S = jnp.asarray(counts_E, jnp.int32).reshape(S, -1).sum(axis=1)
        plans = []
        for rank in range(S):
            _, sent, _, received = _all_to_all(sizes_S, rank, S, is_batch_sharded=False, is_dispatch=False)
            rows_N2 = jnp.stack([jnp.full(len(order_N), rank), jnp.asarray(order_N)], axis=-1)
            local = moe.RoutedMoE.local_permute(
                rows_N2, jnp.asarray(counts_E, jnp.int32)[None], E // S, rank, is_offset=True,
                global_sorted_experts=expert_N, use_custom_sort_vjp=True,
            )  # fmt: skip
            sizes_e = np.asarray(local[2])
            plans.append({
                "send_sizes_S": np.asarray(sent), "recv_sizes_S": np.asarray(received), "group_sizes_e": sizes_e,
                "order_R2": np.asarray(local[0])[: sizes_e.sum()], "overflow": 0,
            })  # fmt: skip
        return plans

    # They name their inputs, which is how a subject says what it takes.
    def sharded_layer(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_by_shard, params, spec, layout, *, token_ids_by_shard=None, table_VK=None, given_ids_by_shard=None,
        buffer_fill: float = np.nan,
    ) -> list[np.ndarray]:  # fmt: skip
        hold_whole_buffer(layout, len(x_by_shard[0]) * spec.router.top_k)
        built = self._built(spec, layout, params)
        x_BSD, arrays = _batch(x_by_shard, token_ids_by_shard, given_ids_by_shard)
        with over(built, buffer_fill):
            output_BSD = _layer(built, buffer_fill)(built.leaves(params, table_VK), x_BSD, arrays)
        found = np.asarray(output_BSD, np.float32)
        return [found[layout.shard_of(rank)] for rank in range(layout.num_ranks)]

    def sharded_gradients(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_by_shard, params, spec, layout, d_output_by_shard, *, token_ids_by_shard=None, table_VK=None,
        given_ids_by_shard=None, buffer_fill: float = np.nan,
    ) -> list[dict[str, np.ndarray]]:  # fmt: skip
        hold_whole_buffer(layout, len(x_by_shard[0]) * spec.router.top_k)
        built = self._built(spec, layout, params)
        x_BSD, arrays = _batch(x_by_shard, token_ids_by_shard, given_ids_by_shard)
        d_output_BSD = jnp.asarray(np.stack(d_output_by_shard), jnp.float32)
        with over(built, buffer_fill):
            d_x_BSD, d_leaves = _gradients(built, buffer_fill)(
                built.leaves(params, table_VK), x_BSD, d_output_BSD, arrays
            )
        d_x_BSD, found = np.asarray(d_x_BSD, np.float32), gradients_of(d_leaves, params)
        return [{"x_TD": d_x_BSD[layout.shard_of(rank)]} | found for rank in range(layout.num_ranks)]

    def _built(self, spec: LayerSpec, layout: ShardLayout, params: LayerParams) -> Built:
        axes = {name: getattr(layout, name) for name in ("data", "fsdp", "expert", "tensor")}
        entries = self.entries | entries_of(layout)
        return built_layer(spec, params.expert_bias_E is not None, tuple(entries.items()), tuple(axes.items()))


def why_not_layout(spec: LayerSpec, layout: ShardLayout) -> str | None:
    """A sentence that says what of a layout MaxText has not, or None."""
    if layout.num_ranks > MOST_RANKS:
        return f"the mesh has {MOST_RANKS} devices"
    if layout.strategy == "node_dedup":
        return "maxtext does not send a token once to each node"
    if layout.strategy == "replicated":
        return "maxtext's ranks that share their tokens send their rows to each other, as replicated_ragged has it"
    if layout.facts.shares_tokens and layout.num_rank_groups > 1:
        return "maxtext's ranks share their tokens where the whole batch is one sequence"
    if layout.placement is not None:
        return "maxtext's experts are placed in their order"
    ring = layout.strategy == "ring_of_experts"
    if ring and layout.buffer_factor is not None:
        return "maxtext's ring has a bounded buffer with use_ragged_sort alone, which is not run here"
    for field in ("num_token_chunks", "num_emb_chunks"):
        if getattr(layout, field) > 1 and not ring:
            return f"maxtext has {field} with its ring of experts alone"
    if layout.num_emb_chunks > 1 and layout.num_token_chunks > 1:
        return "maxtext is judged with one of its two kinds of chunks at a time"
    if ring and spec.router.selector == "table":
        return "maxtext refuses hash routing with its ring of experts"
    if spec.experts.dim % layout.tensor:
        return f"experts.dim is {spec.experts.dim}; maxtext cuts it over the tensor axis, {layout.tensor}"
    return None


def hold_whole_buffer(layout: ShardLayout, rows_of_shard: int) -> None:
    """Unsupported where a buffer would have a part of a row, which MaxText leaves off and a layout counts as one."""
    if layout.buffer_factor is not None and (Fraction(str(layout.buffer_factor)) * rows_of_shard).denominator != 1:
        raise Unsupported("maxtext's buffer has int(factor * rows) rows: without what is left of a row")


def entries_of(layout: ShardLayout) -> dict[str, Any]:
    """What its config says of a layout."""
    found: dict[str, Any] = {}
    if layout.strategy == "ring_of_experts":
        # megablox, or the kernel that can be told a partial sum; both are `masked_gmm` here.
        found = {"use_ring_of_experts": True, "megablox": True, "num_moe_token_chunks": layout.num_token_chunks}
        found |= {"num_moe_emb_chunks": layout.num_emb_chunks} if layout.num_emb_chunks > 1 else {}
    if layout.buffer_factor is not None:
        found["ragged_buffer_factor"] = layout.buffer_factor
    return found


def gathered_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups=None
):
    """What XLA has no instruction for on CPUs (jax-ml/jax#34755); rows that nobody sends stay those of `output`."""
    assert axis_index_groups is None
    me = jax.lax.axis_index(axis_name)
    gathered = (jax.lax.all_gather(each, axis_name) for each in (operand, input_offsets, send_sizes, output_offsets))
    operands, inputs_SS, sizes_SS, outputs_SS = gathered
    place_R = jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        first, size = outputs_SS[source, me], sizes_SS[source, me]
        own_R = (place_R >= first) & (place_R < first + size)
        rows_R = jnp.clip(inputs_SS[source, me] + place_R - first, 0, operand.shape[0] - 1)
        output = jnp.where(own_R[:, None], operands[source][rows_R], output)
    return output


def masked_gmm_with(fill: float):
    """`mblx.gmm` as a sum over the local experts; rows past all groups hold `fill`."""

    def masked_gmm(lhs, rhs, group_sizes, preferred_element_type, *_, group_offset=None, partial_sum=None, **__):
        ends_E = jnp.cumsum(group_sizes)
        place_R = jnp.arange(lhs.shape[0])
        first = 0 if group_offset is None else group_offset
        output = jnp.zeros((lhs.shape[0], rhs.shape[2]), preferred_element_type)
        for e in range(rhs.shape[0]):
            end = ends_E[first + e]
            own_R = (place_R < end) & (place_R >= end - group_sizes[first + e])
            product = jnp.where(own_R[:, None], lhs, 0) @ rhs[e]
            output = jnp.where(own_R[:, None], product.astype(output.dtype), output)
        if partial_sum is not None:
            output = output + partial_sum
        return jnp.where((place_R < ends_E[-1])[:, None], output, fill)

    return masked_gmm


class over:
    """Where a module over a mesh is traced: `scope`, with the two substitutes."""

    def __init__(self, built: Built, fill: float):
        self.contexts = [
            scope(built.mesh, fill=fill),
            mock.patch.object(jax.lax, "ragged_all_to_all", gathered_ragged_all_to_all),
            mock.patch.object(moe.mblx, "gmm", masked_gmm_with(fill)),
        ]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _batch(x_by_shard, token_ids_by_shard, given_ids_by_shard) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Each shard is a sequence of the batch."""
    rows = {"input_ids": token_ids_by_shard, "forced_routed_experts": given_ids_by_shard}
    arrays = {name: jnp.asarray(np.stack(each), jnp.int32) for name, each in rows.items() if each is not None}
    return jnp.asarray(np.stack(x_by_shard), jnp.float32), arrays


def _all_to_all(sent_SS, rank: int, num_ranks: int, **how: Any):
    return moe.RoutedMoE.get_all_to_all_params(sent_SS, rank, num_ranks, **how)


@lru_cache(maxsize=128)
def _layer(built: Built, fill: float):
    return jax.jit(lambda leaves, x_BSD, arrays: built.module(leaves)(x_BSD, **arrays)[0])


@lru_cache(maxsize=128)
def _gradients(built: Built, fill: float):
    def loss(x_BSD, leaves, d_output_BSD, arrays):
        output_BSD = built.module(leaves)(x_BSD, **arrays)[0]
        return jnp.sum(output_BSD.astype(jnp.float32) * d_output_BSD)

    grad = jax.grad(loss, argnums=(0, 1))
    return jax.jit(lambda leaves, x_BSD, d_output_BSD, arrays: grad(x_BSD, leaves, d_output_BSD, arrays))
