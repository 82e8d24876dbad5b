"""moe_jax, parallel: the layer over a mesh of devices. Start reading at `sharded_sparse_matmul`.

    mesh: data x fsdp x expert x tensor, laid out by `moe_ref.ShardLayout`

Every rank works on its own tokens and experts; how rows travel is in `exchange.py`, what a rank does in each
stage in `stages.py`. shard_map checks that what is returned as replicated is: no check is switched off.

Legend: T tokens of all shards, D model dim, E experts, K top_k, S ranks (data, fsdp, expert).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.experts import keep_tokens
from moe_jax.parallel.exchange import unsupported
from moe_jax.parallel.stages import (
    BY_RANK,
    EVERYWHERE,
    Stages,
    input_specs,
    join_columns,
    param_specs,
    split,
    token_axes,
)
from moe_jax.pytrees import tree_of_arrays
from moe_jax.sparse_matmul import RouteOutput
from moe_jax.tokens import flat, flat_tokens, like_tokens
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.layout import AXES, ShardLayout
from moe_ref.specs.params import LayerParams


@tree_of_arrays
@dataclass(frozen=True, kw_only=True)
class ShardedOutput:
    """What the layer returns; arrays of the mesh."""

    output_TD: jax.Array
    """In the shape of the tokens: over the token axes, replicated over the others."""
    decided: RouteOutput
    """Of the T tokens; lies as output_TD does."""
    tokens_per_expert_E: jax.Array
    """(E,) int32, by expert id, of all shards; on every device. Slots that a buffer dropped are counted."""
    overflow_S: jax.Array
    """(S,) int32: rows that each rank had no room for; 0 unless the layout has a buffer_factor."""


def sharded_sparse_matmul(
    x: jax.Array,
    params: LayerParams,
    spec: LayerSpec,
    layout: ShardLayout,
    mesh: Mesh,
    *,
    token_mask_T: jax.Array | None = None,
    inputs: RouterInputs = NO_INPUTS,
    align: AlignSpec | None = None,
    buffer_fill: float | jax.Array = 0.0,
    split_stages: bool = False,
    precision: lax.PrecisionLike = None,
    implementation: str = "auto",
) -> ShardedOutput:
    """The layer of `sparse_matmul`, over the devices of a mesh: no layout changes a result, but for what it drops.

    Args:
        x: (T, D) tokens of all shards, one shard after the other, or (..., D) in that order; each has as many.
        params: of `place`: experts in the order of their places. They lie best as `param_specs` says (`shard`).
        spec, layout: static.
        mesh: of `make_mesh`, or one of the same axes that are explicit: arrays are moved to where they lie best.
        token_mask_T: (T,) bools, or in the leading shape of x, as in `sparse_matmul`.
        inputs: as in `moe_jax.route`, of all tokens. Each shard draws from a key of its own.
        align: as in `sparse_matmul`, of the rows of a rank's own experts; what travels is not padded.
        buffer_fill: what buffer rows that nobody sent start with. Nothing depends on it.
        split_stages: each stage under a shard_map of its own, instead of all in one.
        precision, implementation: as in `grouped_matmul`.

    Raises:
        ValueError: the layout does not fit spec, mesh or tokens, or is one that JAX has not.
    """
    x_TD = flat_tokens(x, spec)
    check_layout(layout, spec, mesh, len(x_TD))
    stages = Stages(spec, layout, align=align, precision=precision, implementation=implementation)
    inputs.check(spec.router, len(x_TD))
    tokens = PartitionSpec(token_axes(layout))
    in_specs = (tokens, param_specs(params, spec, layout), tokens, input_specs(layout), EVERYWHERE)
    mask_T = flat("token_mask_T", token_mask_T, x)
    arrays: Any = _lying((x_TD, params, mask_T, inputs, jnp.asarray(buffer_fill)), in_specs, mesh)
    if split_stages:
        found = _layer(split(stages, params, mesh), stages, *arrays)
    else:
        lies: Any = {"output_TD": tokens, "decided": tokens, "tokens_per_expert_E": EVERYWHERE, "overflow_S": BY_RANK}
        fused = jax.shard_map(
            partial(_layer, lambda name: getattr(stages, name), stages),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=ShardedOutput(**lies),
        )
        found = fused(*arrays)
    return replace(found, output_TD=like_tokens(found.output_TD, x))


def _lying(arrays, specs, mesh: Mesh):
    """The arrays as the specs say, where axes of the mesh are explicit: shard_map moves none there."""
    if AxisType.Explicit not in mesh.axis_types:
        return arrays
    lying = jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    return jax.sharding.reshard(arrays, lying)


def _layer(get: Callable, stages: Stages, x_TD, params: LayerParams, mask_T, inputs: RouterInputs, fill):
    """The order of the stages; `get` gives each by its name."""
    layout = stages.layout
    clean_x_TD = keep_tokens(x_TD, mask_T)
    decided = get("route")(clean_x_TD, params, mask_T, inputs)
    # Without a latent no stage is run for one: a stage of its own is a program of its own.
    expert_input_TD = clean_x_TD if stages.spec.latent is None else get("compress")(clean_x_TD, params)
    if layout.num_token_chunks == 1:
        parts = [(expert_input_TD, decided)]
    else:
        parts = [get("chunk")((expert_input_TD, decided), index=index) for index in range(layout.num_token_chunks)]
    plans = [get("plan")(part.expert_ids_TK) for _, part in parts]
    routed = [_experts(get, stages, *part, plan, params, fill) for part, plan in zip(parts, plans, strict=True)]
    routed_TD = routed[0] if len(routed) == 1 else get("concatenate")(routed)
    return ShardedOutput(
        output_TD=keep_tokens(get("join")(routed_TD, expert_input_TD, clean_x_TD, decided, params), mask_T),
        decided=decided,
        tokens_per_expert_E=get("count")(decided.expert_ids_TK),
        overflow_S=reduce(jnp.add, (plan.overflow_1 for plan in plans)),
    )


def _experts(get: Callable, stages: Stages, x_TD, decided: RouteOutput, plan, params: LayerParams, fill):
    """One chunk of tokens. Gathers and exchanges of a chunk of the model dim depend on no other chunk's products, so
    that a compiler is free to run them meanwhile."""
    if len(x_TD) == 0:
        return x_TD  # a reduce-scatter of no rows never ends on CPU
    chunks = range(stages.layout.num_emb_chunks)
    rows = [get("dispatch")(x_TD, decided, plan, fill, chunk=chunk) for chunk in chunks]
    projected = [get("gmm_up")(rows[chunk], params, plan, chunk=chunk) for chunk in chunks]
    gate_RF, up_RF = reduce(partial(jax.tree.map, jnp.add), projected)
    hidden_RF = get("activate")(gate_RF, up_RF, params, plan, dtype=x_TD.dtype)
    done = [get("gmm_down")(hidden_RF, params, plan, chunk=chunk) for chunk in chunks]
    outputs = [get("unpermute")(rows_RD, decided, plan, fill) for rows_RD in done]
    return join_columns(outputs, stages.spec, stages.layout)


def check_layout(layout: ShardLayout, spec: LayerSpec, mesh: Mesh, num_tokens: int) -> None:
    """The layout fits the layer, the mesh and the tokens, and its strategy is one of JAX's."""
    layout.check(spec)
    if (why_not := unsupported(layout)) is not None:
        raise ValueError(why_not)
    if num_tokens % layout.num_token_shards:
        raise ValueError(
            f"x_TD has {num_tokens} tokens, which the layout's {layout.num_token_shards} token shards do not divide; "
            "shards of a JAX array are equal"
        )
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.axis_types != mesh.axis_types and AxisType.Manual not in context.axis_types:
        raise ValueError(f"the mesh is {mesh}, that of jax.set_mesh {context}; give the layer the mesh that is set")
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    if dict(mesh.shape) != sizes:
        raise ValueError(f"the mesh is {dict(mesh.shape)}; the layout needs {sizes}")


def make_mesh(layout: ShardLayout, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a layout; device i is its rank i."""
    found = jax.devices() if devices is None else list(devices)
    if len(found) < layout.num_ranks:
        raise ValueError(f"the layout has {layout.num_ranks} ranks; there are {len(found)} devices")
    sizes = [getattr(layout, axis) for axis in AXES]
    return Mesh(np.array(found[: layout.num_ranks]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place(params: LayerParams, layout: ShardLayout) -> LayerParams:
    """Parameters with the experts in the order of their places; the router keeps the order of the ids."""
    return params if layout.placement is None else _reordered(params, np.array(layout.placement))


def unplace(params: LayerParams, layout: ShardLayout) -> LayerParams:
    """The inverse of `place`: of parameters, or of their gradients."""
    return params if layout.placement is None else _reordered(params, np.argsort(layout.placement))


def _reordered(params: LayerParams, order) -> LayerParams:
    changes = {}
    for field in fields(LayerParams):
        value = getattr(params, field.name)
        if field.name.startswith(("w_", "b_")) and value is not None:
            changes[field.name] = _in_order(value, order)
    return replace(params, **changes)


def _in_order(value, order):
    """Experts in another order; an array of a mesh stays where it lies."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        return jax.jit(lambda value: value[order], out_shardings=value.sharding)(value)
    return value[order]


def shard(params: LayerParams, spec: LayerSpec, layout: ShardLayout, mesh: Mesh) -> LayerParams:
    """Parameters of `place`, put on the devices that own them.

    Over several processes each has the same arrays of the host, and puts its own pieces on its own devices.
    """

    def put(array, target: jax.ShapeDtypeStruct):
        if isinstance(array, jax.Array):
            return jax.device_put(array, target.sharding)
        host = np.asarray(array, target.dtype)
        return jax.make_array_from_callback(host.shape, target.sharding, lambda index: host[index])

    return jax.tree.map(put, params, abstract_params(params, spec, layout, mesh))


def abstract_params(params: LayerParams, spec: LayerSpec, layout: ShardLayout, mesh: Mesh) -> LayerParams:
    """Shape, dtype and place of each parameter on a mesh: what a checkpoint is restored into.

    A checkpoint holds experts in the order of their ids. Save `unplace(params, layout)`; restore into what this returns
    for the layout to come, which need not be the one before, and `place` what came. orbax leaves out what is None here,
    the balancing bias too, and returns None for what was None when it was saved.

    Args:
        params: arrays, or what `jax.eval_shape` makes of them; their shapes and dtypes alone are read.
    """
    specs: Any = param_specs(params, spec, layout)

    def of(array, spec) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(of, params, specs)


def use_cpu_devices(count: int) -> None:
    """At least so many CPU devices, to run a mesh without accelerators; before JAX starts, and without starting it.

    Raises:
        RuntimeError: JAX has started with fewer.
    """
    if jax.config.jax_num_cpu_devices >= count:  # type: ignore[attr-defined]  # made at run time
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started
        found = len(jax.devices("cpu"))
        if found < count:
            raise RuntimeError(
                f"JAX has started with {found} CPU devices, {count} are needed; call use_cpu_devices before any array "
                f"is made, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            ) from None
