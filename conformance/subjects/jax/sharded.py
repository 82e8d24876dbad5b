"""conformance, a subject: moe_jax over a mesh of eight CPU devices, one process, every device read by itself."""

from dataclasses import fields
from functools import lru_cache
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conformance.core.inputs import ShardedInputs, split_inputs
from conformance.core.subject import Subject
from conformance.subjects.jax.arrays import on_host, with_bias
from moe_jax.parallel import (
    Stages,
    exchange,
    make_mesh,
    param_specs,
    place,
    sharded_sparse_matmul,
    split,
    token_axes,
    unplace,
    use_cpu_devices,
)
from moe_ref import LayerParams, LayerSpec
from moe_ref.specs.layout import ShardLayout

MOST_RANKS = 8
PROGRAMS = 128
"""Compiled programs that are kept; each has a few megabytes."""

use_cpu_devices(MOST_RANKS)


class JaxLayouts(Subject):
    """`moe_jax.parallel`, compiled for each spec and layout."""

    name = "jax-layouts"
    version = jax.__version__
    compiles = equal_shards = True

    def supports_layer(self, spec, layout=None):
        """What a JAX mesh of this process is not."""
        if layout is None:
            return None
        if spec.router.selector == "random":
            return "each shard draws from a JAX key of its own"
        if layout.num_ranks > MOST_RANKS:
            return f"the mesh has {MOST_RANKS} devices"
        return exchange.unsupported(layout)

    def dispatch(self, expert_ids_by_shard, layout, spec):
        """Each row is known by what it carries: the rank and the number of its token."""
        ids_TK = np.concatenate(expert_ids_by_shard)
        metadata, rows_R2 = _dispatch(spec, layout)(on_host(ids_TK), _names_of_tokens(expert_ids_by_shard, layout))
        ranks = [layout.rank(d, f, e) for d, f, e in np.ndindex(layout.data, layout.fsdp, layout.expert)]
        parts, found = [_by_rank(array, layout) for array in (*jax.tree.leaves(metadata), rows_R2)], []
        names = [*_METADATA, "rows_R2"]
        for rank in ranks:
            mine = dict(zip(names, (part[rank] for part in parts), strict=True))
            sizes_e = mine["group_sizes_e"]
            e = layout.coordinates(rank)[2]
            experts = layout.experts_of(e, spec.router.num_experts)
            shards, order = layout.shards_of_group(layout.group_of(rank)), []
            for row, expert_id in zip(mine.pop("rows_R2"), np.repeat(experts, sizes_e), strict=False):
                source, token = (int(number) for number in row)
                slot = expert_ids_by_shard[shards[source]][token].tolist().index(expert_id)
                # What is replicated is every rank's own.
                order.append((e if layout.facts.shares_tokens else source, token * spec.router.top_k + slot))
            found.append(mine | {"order_R2": np.array(order, int).reshape(-1, 2), "overflow": int(mine["overflow"][0])})
        return found

    def sharded_layer(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        *,
        buffer_fill: float = 0.0,
        **inputs: Unpack[ShardedInputs],
    ) -> list[np.ndarray]:
        """Each device's own copy of its shard's output."""
        arrays = _joined(x_by_shard), _params(params, spec, layout), _inputs(inputs)
        return _by_rank(_layer(spec, layout)(*arrays, np.float32(buffer_fill)), layout)

    def sharded_gradients(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        d_output_by_shard: list[np.ndarray],
        *,
        buffer_fill: float = 0.0,
        **inputs: Unpack[ShardedInputs],
    ) -> list[dict[str, np.ndarray]]:
        """By `jax.grad`; a parameter of a rank is put together from its own piece and the nearest of the others."""
        d_x_TD, d_params = _gradients(spec, layout)(
            _joined(x_by_shard),
            _params(params, spec, layout),
            _joined(d_output_by_shard),
            _inputs(inputs),
            np.float32(buffer_fill),
        )
        found: list[dict] = [{"x_TD": d_x_TD} for d_x_TD in _by_rank(d_x_TD, layout)]
        given = [f.name for f in fields(LayerParams) if getattr(params, f.name) is not None]
        whole = {name: _whole_by_rank(getattr(d_params, name), layout) for name in given}
        for rank, mine in enumerate(found):
            blank: dict = {field.name: None for field in fields(LayerParams)}
            own = unplace(LayerParams(**blank | {name: whole[name][rank] for name in given}), layout)
            mine |= {name: getattr(own, name) for name in given}
        return found


_METADATA = ("send_sizes_S", "recv_sizes_S", "group_sizes_e", "overflow")


@lru_cache(maxsize=PROGRAMS)
def _dispatch(spec: LayerSpec, layout: ShardLayout):
    stages, mesh = Stages(spec, layout), make_mesh(layout)
    get = split(stages, LayerParams.init(spec), mesh)
    by_rank = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))

    def run(ids_TK, names_T2):
        plan = get("plan")(ids_TK)
        rows_R2 = _send(names_T2, plan, layout, mesh)
        return [plan.send_sizes_S, plan.recv_sizes_S, plan.rows.group_sizes_E, plan.overflow_1], rows_R2

    return jax.jit(run, out_shardings=(by_rank, NamedSharding(mesh, PartitionSpec(_ROW_AXES))))


_ROW_AXES = ("tensor", "data", "fsdp", "expert")


def _send(names_T2, plan, layout: ShardLayout, mesh: Mesh):
    """What names tokens travels as tokens do."""
    return jax.shard_map(
        lambda names_T2, plan: exchange.dispatch(names_T2, plan, layout, buffer_fill=jnp.nan),
        mesh=mesh,
        in_specs=(PartitionSpec(token_axes(layout)), PartitionSpec(("data", "fsdp", "expert"))),
        out_specs=PartitionSpec(_ROW_AXES),
    )(names_T2, plan)


@lru_cache(maxsize=PROGRAMS)
def _layer(spec: LayerSpec, layout: ShardLayout):
    mesh = make_mesh(layout)

    def run(x_TD, params, inputs, buffer_fill):
        return sharded_sparse_matmul(x_TD, params, spec, layout, mesh, buffer_fill=buffer_fill, **inputs).output_TD

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec(token_axes(layout))))


@lru_cache(maxsize=PROGRAMS)
def _gradients(spec: LayerSpec, layout: ShardLayout):
    mesh = make_mesh(layout)
    tokens = NamedSharding(mesh, PartitionSpec(token_axes(layout)))
    specs: Any = param_specs(with_bias(LayerParams.init(spec), spec), spec, layout)

    def run(x_TD, params, d_output_TD, inputs, buffer_fill):
        def loss(x_TD, params):
            found = sharded_sparse_matmul(x_TD, params, spec, layout, mesh, buffer_fill=buffer_fill, **inputs)
            return jnp.sum(found.output_TD * d_output_TD)

        return jax.grad(loss, argnums=(0, 1))(x_TD, params)

    return jax.jit(run, out_shardings=(tokens, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)))


def _names_of_tokens(by_shard, layout: ShardLayout):
    """(T, 2) the shard, among those of its rank group, and the number of each token."""
    names = []
    for shard, tokens in enumerate(by_shard):
        source = shard % layout.shards_per_group
        names += [(source, token) for token in range(len(tokens))]
    return np.array(names, np.float32).reshape(-1, 2)


def _by_rank(array: jax.Array, layout: ShardLayout) -> list[np.ndarray]:
    """What each device holds, in rank order."""
    shards = {shard.device.id: shard.data for shard in array.addressable_shards}
    return [np.asarray(shards[device.id]) for device in make_mesh(layout).devices.flat]


def _whole_by_rank(array: jax.Array, layout: ShardLayout) -> list[np.ndarray]:
    """For each rank the whole array: pieces of ranks that differ from it in the axes that split it, and no other."""
    shards = {shard.device.id: shard for shard in array.addressable_shards}
    ranks = [shards[device.id] for device in make_mesh(layout).devices.flat]
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    splits = {axis for axis in jax.tree.leaves(tuple(sharding.spec)) if axis is not None}
    axes = ("data", "fsdp", "expert", "tensor")
    whole_by_rank = []
    for rank in range(layout.num_ranks):
        whole = np.full(array.shape, np.nan, array.dtype)
        for other, shard in enumerate(ranks):
            pairs = zip(axes, layout.coordinates(rank), layout.coordinates(other), strict=True)
            if all(mine == its or axis in splits for axis, mine, its in pairs):
                whole[shard.index] = np.asarray(shard.data)
        whole_by_rank.append(whole)
    return whole_by_rank


def _inputs(inputs: ShardedInputs) -> dict:
    """Keyword arguments of the layer; what is by shard becomes one array of all shards."""
    own, rest = split_inputs(inputs, ShardedInputs)
    masks = rest.get("token_mask_by_shard")
    return {"token_mask_T": None if masks is None else _joined(masks), "inputs": own.map(on_host)}


def _params(params: LayerParams, spec: LayerSpec, layout: ShardLayout) -> LayerParams:
    return jax.tree.map(on_host, place(with_bias(params, spec), layout))


def _joined(by_shard) -> np.ndarray:
    return on_host(np.concatenate(by_shard))
