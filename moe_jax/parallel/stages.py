"""moe_jax, stages of the sharded layer: what one rank does in each, and how its inputs and outputs lie on the mesh.

    route -> compress -> plan -> dispatch -> gmm_up -> activate -> gmm_down -> unpermute -> join

Each stage runs under a shard_map of its own, with the specs of `stage_specs`, or all of them in one (`layer.py`).

Legend: T tokens of a shard, K top_k, D model dim, F expert hidden dim, E experts, R rows of this rank.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from moe_jax import routing
from moe_jax.balance import tokens_per_expert
from moe_jax.experts import null_output, shared_output
from moe_jax.latent import compress, expand
from moe_jax.parallel import exchange
from moe_jax.parallel.collectives import vary
from moe_jax.parallel.strategies import ShardMetadata
from moe_jax.sparse_matmul import RouteOutput, activate, gmm_down, gmm_up, route_tokens
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.inputs import BY_TOKEN, RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.layout import AXES, ShardLayout
from moe_ref.specs.params import LayerParams

P = PartitionSpec
RANKS = ("data", "fsdp", "expert")
"""The ranks that exchange rows, and those that do not; tensor ranks do the same as each other."""
BY_RANK, EVERYWHERE = P(RANKS), P()
ROWS = P(("tensor", *RANKS))
"""Rows of each rank, and of each tensor rank its own: copies before the experts, partial sums behind them."""
HIDDEN = P(RANKS, "tensor")


def input_specs(layout: ShardLayout) -> RouterInputs:
    """How the inputs of a selector lie on the mesh: what has an entry for each token as the tokens do."""
    specs: Any = {field.name: EVERYWHERE for field in fields(RouterInputs)}
    return RouterInputs(**specs | dict.fromkeys(BY_TOKEN, P(token_axes(layout))))


def token_axes(layout: ShardLayout) -> tuple[str, ...]:
    """The mesh axes over which tokens are spread."""
    return RANKS[:2] if layout.facts.shares_tokens else RANKS


def param_specs(params: LayerParams, spec: LayerSpec, layout: ShardLayout) -> LayerParams:
    """How each parameter lies on the mesh: experts over expert, D over fsdp, F over tensor.

    A parameter without D, or one whose D does not divide, is whole on each fsdp rank; so is a shared expert on each
    tensor rank where its F does not divide.
    """
    found: Any = {}
    for field in fields(LayerParams):
        found[field.name] = None
        if getattr(params, field.name) is not None:
            found[field.name] = P(*(_axis_of(letter, field.name, spec, layout) for letter in _letters(field.name)))
    return LayerParams(**found)


def _letters(name: str) -> str:
    """Of each axis of a parameter; learned_scale has none that is split."""
    suffix = name.rpartition("_")[2]
    return suffix if suffix.isupper() else ""


def _axis_of(letter: str, name: str, spec: LayerSpec, layout: ShardLayout) -> str | None:
    if letter == "E" and len(_letters(name)) > 1 and not name.startswith("gate"):
        return "expert"
    if letter == "D" and _parts(spec, layout, name) > 1:
        return "fsdp"
    if letter == "F" and (not name.startswith("shared") or splits_shared(spec, layout)):
        return "tensor"
    return None


def _parts(spec: LayerSpec, layout: ShardLayout, name: str = "w_up_EDF") -> int:
    """Pieces of D that the fsdp ranks store of a parameter; each has a part of every chunk of the model dim."""
    # The D of the routed experts is that of the latent where there is one.
    D = (spec.routed_experts if name.startswith(("w_", "b_", "constant")) else spec.experts).dim
    return layout.fsdp if D % (layout.fsdp * layout.num_emb_chunks) == 0 else 1


def splits_shared(spec: LayerSpec, layout: ShardLayout) -> bool:
    """Whether each tensor rank has a slice of F of the shared experts."""
    return spec.shared is not None and spec.shared.hidden_dim % layout.tensor == 0


def stage_specs(params: LayerParams, spec: LayerSpec, layout: ShardLayout) -> dict[str, tuple[tuple, Any]]:
    """The in_specs and out_specs of each stage, in order; of a tree the spec is that of all its leaves."""
    tokens, weights = P(token_axes(layout)), param_specs(params, spec, layout)
    return {
        "route": ((tokens, weights, tokens, input_specs(layout)), tokens),
        "compress": ((tokens, weights), tokens),
        "chunk": ((tokens,), tokens),
        "plan": ((tokens,), BY_RANK),
        "dispatch": ((tokens, tokens, BY_RANK, EVERYWHERE), ROWS),
        "gmm_up": ((ROWS, weights, BY_RANK), HIDDEN),
        "activate": ((HIDDEN, HIDDEN, weights, BY_RANK), HIDDEN),
        "gmm_down": ((HIDDEN, weights, BY_RANK), ROWS),
        "unpermute": ((ROWS, tokens, BY_RANK, EVERYWHERE), tokens),
        "concatenate": ((tokens,), tokens),
        "join": ((tokens, tokens, tokens, tokens, weights), tokens),
        "count": ((tokens,), EVERYWHERE),
    }


class Stages:
    """The stages of one rank; inside shard_map. Options are those of `grouped_matmul`.

    Args:
        align: the experts of a rank see their rows padded up to a multiple; None: as they are.
    """

    def __init__(self, spec: LayerSpec, layout: ShardLayout, *, align: AlignSpec | None = None, **options):
        self.spec, self.layout, self.align, self.options = spec, layout, align, options

    def route(
        self, x_TD: jax.Array, params: LayerParams, token_mask_T: jax.Array | None, inputs: RouterInputs
    ) -> RouteOutput:
        """Each rank routes its own tokens."""
        router = self.spec.router
        # A number for each shard: what depends on the place of a token in the batch, or is drawn.
        number = _number_of_rank(token_axes(self.layout))
        if router.selector == "round_robin":
            first = 0 if inputs.first_token is None else inputs.first_token
            inputs = replace(inputs, first_token=first + number * len(x_TD))
        if router.selector == "random" and inputs.seed is not None:
            inputs = replace(inputs, seed=jax.random.fold_in(inputs.seed, number))
        gate_ED, gate_bias_E = self._whole("gate_ED", params), self._whole("gate_bias_E", params)
        logits_TE = routing.gate(x_TD, gate_ED, gate_bias_E, spec=router)
        return route_tokens(
            logits_TE, router, expert_bias_E=params.expert_bias_E, learned_scale=params.learned_scale,
            token_mask_T=token_mask_T, inputs=inputs,
        )[0]  # fmt: skip

    def compress(self, x_TD: jax.Array, params: LayerParams) -> jax.Array:
        """What the experts see of this shard's tokens: their latent, or themselves."""
        return compress(x_TD, self._with_whole("latent_w_down", params), precision=self.options.get("precision"))

    def chunk(self, tokens: Any, *, index: int) -> Any:
        """Chunk `index` of the tokens of this shard, of any tree of arrays with an entry for each token."""
        chunk = self.layout.chunks(len(jax.tree.leaves(tokens)[0]))[index]
        return jax.tree.map(lambda array: array[chunk], tokens)

    def concatenate(self, chunks: list[jax.Array]) -> jax.Array:
        """The chunks of this shard's tokens as one array; undoes `chunk`."""
        return jnp.concatenate(chunks)

    def plan(self, expert_ids_TK: jax.Array) -> ShardMetadata:
        """Where rows go; `RouteOutput` is not asked again, so that counts do not depend on chunks."""
        return exchange.plan(expert_ids_TK, self.layout, self.spec.router, self.align)

    def dispatch(
        self, x_TD: jax.Array, decided: RouteOutput, metadata: ShardMetadata, buffer_fill: jax.Array, *, chunk: int = 0
    ) -> jax.Array:
        """The rows of this rank's experts, one chunk of the model dim."""
        weights_TK = decided.weights_TK if self.spec.router.weight_on == "input" else None
        x_TC = self._columns(x_TD, chunk)
        return exchange.dispatch(x_TC, metadata, self.layout, input_weights_TK=weights_TK, buffer_fill=buffer_fill)

    def gmm_up(
        self, rows_RD: jax.Array, params: LayerParams, metadata: ShardMetadata, *, chunk: int = 0
    ) -> tuple[jax.Array | None, jax.Array]:
        """One chunk's part of the gate and up projections; weights are gathered over fsdp, one chunk at a time."""
        w_gate_EDF, w_up_EDF = self._whole("w_gate_EDF", params, chunk), self._whole("w_up_EDF", params, chunk)
        options = dict(self.options)
        if self.layout.num_emb_chunks > 1:
            # Parts are summed before they are rounded to the dtype of the tokens.
            options["preferred_element_type"] = jnp.promote_types(rows_RD.dtype, jnp.float32)
        return gmm_up(rows_RD, w_gate_EDF, w_up_EDF, metadata.rows, **options)

    def activate(
        self, gate_RF: jax.Array | None, up_RF: jax.Array, params: LayerParams, metadata: ShardMetadata, *, dtype: Any
    ) -> jax.Array:
        """Biases and activation, on this rank's slice of F; in the dtype of the tokens."""
        return activate(gate_RF, up_RF, params, metadata.rows, self.spec.experts).astype(dtype)

    def gmm_down(
        self, hidden_RF: jax.Array, params: LayerParams, metadata: ShardMetadata, *, chunk: int = 0
    ) -> jax.Array:
        """One chunk of the output rows; those of tensor ranks are partial sums, with the bias in the first."""
        b_down_ED = self._whole("b_down_ED", params, chunk)
        if b_down_ED is not None:
            b_down_ED = jnp.where(lax.axis_index("tensor") == 0, vary(b_down_ED, AXES), 0)
        w_down_EFD = self._whole("w_down_EFD", params, chunk)
        return gmm_down(hidden_RF, w_down_EFD, b_down_ED, metadata.rows, **self.options)

    def unpermute(
        self, rows_RD: jax.Array, decided: RouteOutput, metadata: ShardMetadata, buffer_fill: jax.Array
    ) -> jax.Array:
        """One chunk of the weighted sums of this shard's tokens, summed over tensor ranks last."""
        # A weight that is on the input is not applied again.
        weights_TK = decided.weights_TK if self.spec.router.weight_on == "output" else None
        partial_TD = exchange.unpermute(
            rows_RD, metadata, self.layout, output_weights_TK=weights_TK, buffer_fill=buffer_fill
        )
        return lax.psum(partial_TD, "tensor")

    def join(
        self,
        routed_TD: jax.Array,
        expert_input_TD: jax.Array,
        x_TD: jax.Array,
        decided: RouteOutput,
        params: LayerParams,
    ) -> jax.Array:
        """Null experts and shared experts are the token's own rank's, and join once; a latent is left in between."""
        router, spec = self.spec.router, self.spec
        summed_TD = routed_TD + null_output(
            expert_input_TD, decided.expert_ids_TK, decided.weights_TK, self._with_whole("constant", params), router
        )
        scaled_TD = expand(
            summed_TD * router.output_scale,
            self._with_whole("latent", params),
            spec,
            precision=self.options.get("precision"),
        )
        if spec.shared is None:
            return scaled_TD
        whole = self._with_whole("shared", params)
        own_x_TD = vary(x_TD, ("tensor",)) if splits_shared(spec, self.layout) else x_TD
        shared_TD = shared_output(
            own_x_TD, decided.shared_weights_TS, whole, spec, precision=self.options.get("precision")
        )
        if splits_shared(spec, self.layout):
            shared_TD = lax.psum(shared_TD, "tensor")
        joined_TD = scaled_TD + shared_TD
        return joined_TD / 2 if spec.shared.combine == "average" else joined_TD

    def count(self, expert_ids_TK: jax.Array) -> jax.Array:
        """Rows of each expert on the whole mesh, by expert id, the same on every rank."""
        return tokens_per_expert(expert_ids_TK, self.spec.router.num_experts, axis_name=token_axes(self.layout))

    def _with_whole(self, prefix: str, params: LayerParams) -> LayerParams:
        """The parameters whose names begin so with all of D, the others as they are."""
        names = [f.name for f in fields(LayerParams) if f.name.startswith(prefix)]
        return replace(params, **{name: self._whole(name, params) for name in names})

    def _whole(self, name: str, params: LayerParams, chunk: int | None = None) -> Any:
        """A parameter with all of D, or all of a chunk of it; its gradient is reduce-scattered."""
        value, letters = getattr(params, name), _letters(name)
        if value is None or "D" not in letters:
            return value
        axis, n = letters.index("D"), self.layout.num_emb_chunks
        if chunk is not None and n > 1:
            width = value.shape[axis] // n
            value = lax.slice_in_dim(value, chunk * width, (chunk + 1) * width, axis=axis)
        if _parts(self.spec, self.layout, name) == 1:
            return value
        return lax.all_gather(value, "fsdp", axis=axis, tiled=True)

    def _columns(self, x_TD, chunk: int):
        """The columns of a chunk: of the piece of each fsdp rank the chunk's part, as `_whole` gathers them."""
        T, D = x_TD.shape
        n, parts = self.layout.num_emb_chunks, _parts(self.spec, self.layout)
        return x_TD if n == 1 else x_TD.reshape(T, parts, n, D // n // parts)[:, :, chunk].reshape(T, D // n)


def join_columns(chunks: list[jax.Array], spec: LayerSpec, layout: ShardLayout) -> jax.Array:
    """The chunks of the model dim as one array again; undoes `Stages._columns`."""
    if len(chunks) == 1:
        return chunks[0]
    T, width = chunks[0].shape
    parts = _parts(spec, layout)
    pieces = jnp.stack([chunk.reshape(T, parts, width // parts) for chunk in chunks], axis=2)
    return pieces.reshape(T, len(chunks) * width)


def _number_of_rank(axes: tuple[str, ...]):
    """The number of this rank among those that differ in these axes."""
    number = jnp.int32(0)
    for axis in axes:
        number = number * lax.axis_size(axis) + lax.axis_index(axis)
    return number


def split(stages: Stages, params: LayerParams, mesh: Mesh) -> Callable:
    """Stages by name, each under a shard_map of its own: get(name)(arrays, static options) on arrays of the mesh."""
    specs = stage_specs(params, stages.spec, stages.layout)

    def get(name: str) -> Callable:
        in_specs, out_specs = specs[name]

        def run(*arrays, **static):
            own = partial(getattr(stages, name), **static)
            return jax.shard_map(own, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)

        return run

    return get
