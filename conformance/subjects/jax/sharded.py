"""conformance, the subjects jax-layouts and jax-processes: moe_jax over a mesh of CPU devices, each read by itself.

The devices are of one process, or of two or four that are joined by gloo. Programs run where the devices are, and
return `Pieces`: what each device of their process holds. The classes put together what all processes returned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conformance.core.inputs import ShardedInputs, split_inputs
from conformance.core.subject import Subject
from conformance.subjects.jax.arrays import on_host, with_bias
from conformance.subjects.ranks import JAX, Ranks, shared
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
from moe_ref.specs.layout import AXES, ShardLayout

MOST_RANKS = 8
PROGRAMS = 128
"""Compiled programs that are kept; each has a few megabytes."""

use_cpu_devices(MOST_RANKS)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """One array of the mesh, or those devices of it that a process has."""

    shape: tuple[int, ...]
    splits: frozenset[str]
    """Axes of the mesh that split it; over the others it is replicated."""
    of_rank: dict[int, tuple[tuple[slice, ...], np.ndarray]]
    """rank -> where its piece lies in the array, and the piece."""

    @classmethod
    def of(cls, array: jax.Array, mesh: Mesh) -> "Pieces":
        """Those of this process."""
        shards = {shard.device.id: shard for shard in array.addressable_shards}
        found = {}
        for rank, device in enumerate(mesh.devices.flat):
            if device.id in shards:
                found[rank] = (shards[device.id].index, np.asarray(shards[device.id].data))
        assert isinstance(array.sharding, NamedSharding)
        axes = {axis for axis in jax.tree.leaves(tuple(array.sharding.spec)) if axis is not None}
        return cls(shape=array.shape, splits=frozenset(axes), of_rank=found)

    def joined(self, others: "list[Pieces]") -> "Pieces":
        """With those of other processes."""
        found = dict(self.of_rank)
        for other in others:
            found |= other.of_rank
        return Pieces(shape=self.shape, splits=self.splits, of_rank=found)

    def by_rank(self) -> list[np.ndarray]:
        """What each device holds, in rank order."""
        return [self.of_rank[rank][1] for rank in sorted(self.of_rank)]

    def whole_by_rank(self, layout: ShardLayout) -> list[np.ndarray]:
        """For each rank the whole array, of pieces of ranks that differ from it in the axes that split it alone."""
        whole_by_rank = []
        for rank in range(layout.num_ranks):
            whole = np.full(self.shape, np.nan, self.of_rank[rank][1].dtype)
            for other, (index, data) in self.of_rank.items():
                pairs = zip(AXES, layout.coordinates(rank), layout.coordinates(other), strict=True)
                if all(mine == its or axis in self.splits for axis, mine, its in pairs):
                    whole[index] = data
            whole_by_rank.append(whole)
        return whole_by_rank


class JaxLayouts(Subject):
    """`moe_jax.parallel`, compiled for each spec and layout."""

    name = "jax-layouts"
    version = jax.__version__
    compiles = equal_shards = True

    def supports_layer(self, spec, layout=None):
        """What a JAX mesh of this process is not."""
        why = self.supports(spec.router, layout)
        if layout is None or why is not None:
            return why
        if spec.router.selector == "random":
            return "each shard draws from a JAX key of its own"
        if layout.num_ranks > MOST_RANKS:
            return f"the mesh has {MOST_RANKS} devices"
        return exchange.unsupported(layout)

    def on_devices(self, layout: ShardLayout, function: Callable, *arguments) -> Any:
        """What `function(*arguments)` returns where the devices are: a tree of the pieces of all devices."""
        return function(*arguments)

    def dispatch(self, expert_ids_by_shard, layout, spec):
        """Each row is known by what it carries: the rank and the number of its token."""
        ids_TK = on_host(np.concatenate(expert_ids_by_shard))
        names_T2 = _names_of_tokens(expert_ids_by_shard, layout)
        pieces = self.on_devices(layout, dispatch_on_devices, spec, layout, ids_TK, names_T2)
        ranks = [layout.rank(d, f, e) for d, f, e in np.ndindex(layout.data, layout.fsdp, layout.expert)]
        parts, found = [array.by_rank() for array in pieces], []
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
        return self.on_devices(layout, layer_on_devices, spec, layout, *arrays, np.float32(buffer_fill)).by_rank()

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
        d_x_TD, d_params = self.on_devices(
            layout,
            gradients_on_devices,
            spec,
            layout,
            _joined(x_by_shard),
            _params(params, spec, layout),
            _joined(d_output_by_shard),
            _inputs(inputs),
            np.float32(buffer_fill),
        )
        found: list[dict] = [{"x_TD": d_x_TD} for d_x_TD in d_x_TD.by_rank()]
        whole = {name: d_params[name].whole_by_rank(layout) for name in params.by_name()}
        for rank, mine in enumerate(found):
            own = unplace(LayerParams(**{name: by_rank[rank] for name, by_rank in whole.items()}), layout)
            mine |= {name: getattr(own, name) for name in whole}
        return found


class JaxProcesses(JaxLayouts):
    """The same over processes, as the hosts of a cluster are: four where the ranks divide by four, else two."""

    name = "jax-processes"

    @property
    def ranks(self) -> Ranks:
        """The pool, which starts with the first call."""
        return shared("conformance.subjects.jax.sharded", join=JAX)

    def supports_layer(self, spec, layout=None):
        if layout is not None and layout.num_ranks % 2:
            return "its processes are two or four, with as many ranks in each"
        return super().supports_layer(spec, layout)

    def on_devices(self, layout: ShardLayout, function: Callable, *arguments) -> Any:
        size = 2 if layout.num_ranks % 4 else 4
        first, *others = self.ranks.run(size, function, *arguments)
        return _together(first, others)


def _together(first: Any, others: list[Any]) -> Any:
    """Trees of pieces of several processes as one."""
    return jax.tree.map(lambda mine, *rest: mine.joined(list(rest)), first, *others)


_METADATA = ("send_sizes_S", "recv_sizes_S", "group_sizes_e", "overflow")


# Where the devices are.


def mesh_of(layout: ShardLayout) -> Mesh:
    """As many devices of each process, in the order of the processes."""
    each = layout.num_ranks // jax.process_count()
    by_process = [jax.local_devices(process_index=process) for process in range(jax.process_count())]
    return make_mesh(layout, [device for devices in by_process for device in devices[:each]])


def dispatch_on_devices(spec: LayerSpec, layout: ShardLayout, ids_TK: np.ndarray, names_T2: np.ndarray) -> list[Pieces]:
    """The plan of each rank, then its rows."""
    mesh = mesh_of(layout)
    return [Pieces.of(array, mesh) for array in jax.tree.leaves(_dispatch(spec, layout)(ids_TK, names_T2))]


def layer_on_devices(spec: LayerSpec, layout: ShardLayout, *arrays: Any) -> Pieces:
    """The output."""
    return Pieces.of(_layer(spec, layout)(*arrays), mesh_of(layout))


def gradients_on_devices(spec: LayerSpec, layout: ShardLayout, *arrays: Any) -> tuple[Pieces, dict[str, Pieces]]:
    """Of the tokens, and of each parameter."""
    mesh = mesh_of(layout)
    d_x_TD, d_params = _gradients(spec, layout)(*arrays)
    return Pieces.of(d_x_TD, mesh), {name: Pieces.of(array, mesh) for name, array in d_params.by_name().items()}


@lru_cache(maxsize=PROGRAMS)
def _dispatch(spec: LayerSpec, layout: ShardLayout):
    stages, mesh = Stages(spec, layout), mesh_of(layout)
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
    mesh = mesh_of(layout)

    def run(x_TD, params, inputs, buffer_fill):
        return sharded_sparse_matmul(x_TD, params, spec, layout, mesh, buffer_fill=buffer_fill, **inputs).output_TD

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec(token_axes(layout))))


@lru_cache(maxsize=PROGRAMS)
def _gradients(spec: LayerSpec, layout: ShardLayout):
    mesh = mesh_of(layout)
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


def _inputs(inputs: ShardedInputs) -> dict:
    """Keyword arguments of the layer; what is by shard becomes one array of all shards."""
    own, rest = split_inputs(inputs, ShardedInputs)
    masks = rest.get("token_mask_by_shard")
    return {"token_mask_T": None if masks is None else _joined(masks), "inputs": own.map(on_host)}


def _params(params: LayerParams, spec: LayerSpec, layout: ShardLayout) -> LayerParams:
    return jax.tree.map(on_host, place(with_bias(params, spec), layout))


def _joined(by_shard) -> np.ndarray:
    return on_host(np.concatenate(by_shard))
