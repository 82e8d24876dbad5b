"""moe_jax, sparse matmul: the layer, every token on its own experts. Start reading at `sparse_matmul`.

    gate -> route (-> limit) -> dispatch -> gmm_up -> activate -> gmm_down -> unpermute (+ shared experts)

A latent is made before dispatch, and left after unpermute (`latent.py`).

Each stage is public and usable alone. Routing never touches the tokens, and what moves rows never touches the router,
so that one `route` serves any number of chunks, of tokens or of the model dim (AI-Hypercomputer/maxtext#3981).

Legend: T tokens, D model dim, E experts, F expert hidden dim, K top_k, R = T * K rows, S shared experts.
"""

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from moe_jax import routing
from moe_jax.align import align_rows
from moe_jax.arrays import AxisName
from moe_jax.capacity import apply_capacity
from moe_jax.experts import hide, join, keep_tokens, null_output
from moe_jax.explicit import in_any_mode, output_and_choice
from moe_jax.grouped_matmul import grouped_matmul
from moe_jax.invariant import of_each_token
from moe_jax.latent import compress, expand
from moe_jax.permute import RouteMetadata, permute
from moe_jax.pytrees import tree_of_arrays
from moe_jax.rows import dispatch, unpermute
from moe_jax.tokens import check_open, flat, flat_tokens, like_tokens, sequences_of
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import CapacitySpec, check_capacity
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.invariant import check_batch_invariant
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec


@tree_of_arrays
@dataclass(frozen=True, kw_only=True)
class RouteOutput:
    """What the router decided for each token."""

    expert_ids_TK: jax.Array
    """(T, K) int32; -1 is an unused slot."""
    weights_TK: jax.Array
    scores_TE: jax.Array | None
    """For losses; None where the spec scores no expert before the selection."""
    shared_weights_TS: jax.Array | None
    """None unless the router scores the shared experts."""
    logits_TE: jax.Array | None = None
    """For losses, with `routing.scale_logits` for those of scores; 0 for padding tokens."""
    chosen_ids_TK: jax.Array | None = None
    """The choice before a capacity dropped slots: what counts and losses are of."""


@in_any_mode(output_and_choice)
def sparse_matmul(
    x: jax.Array,
    params: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T: jax.Array | None = None,
    inputs: RouterInputs = NO_INPUTS,
    capacity: CapacitySpec | None = None,
    align: AlignSpec | None = None,
    sequence_of_T: jax.Array | None = None,
    num_sequences: int = 1,
    axis_name: AxisName = None,
    num_token_chunks: int = 1,
    num_emb_chunks: int = 1,
    precision: lax.PrecisionLike = None,
    implementation: str = "auto",
    batch_invariant: bool = False,
) -> tuple[jax.Array, RouteOutput]:
    """One MoE layer: every token visits its own experts, and no other.

    Args:
        x: (T, D) tokens, or (..., D): T counts them in order, here and in what the router decided.
        params: a pytree of arrays; init and layouts are in `moe_ref.LayerParams`.
        spec: static.
        token_mask_T: (T,) bools, or in the leading shape of x; a padding token (False) is not read, and its output is
            0, shared experts included.
        inputs: what the selector reads, as in `moe_jax.route`.
        capacity: how many slots an expert takes, static; None: all. Dropped slots move no row.
        align: the experts see their rows padded up to a multiple, static; None: as they are. No value depends on it.
        sequence_of_T, num_sequences, axis_name: as in `apply_capacity`, for the scopes that need them. Sequences may
            have the leading shape of x; None: (B, L, D) is B of them, and (T, D) is one.
        num_token_chunks: the routed experts run on this many chunks of the tokens, one after the other.
        num_emb_chunks: rows are moved in this many chunks of the model dim; their up projections are summed.
        precision, implementation: as in `grouped_matmul`.
        batch_invariant: the output of a token has the same bits whatever else is in the batch: each is computed alone,
            one after the other, many times slower (docs/invariant.md).

    Returns:
        output: of the shape and dtype of x, and what the router decided of its T tokens.
    """
    x_TD, token_mask_T = flat_tokens(x, spec), flat("token_mask_T", token_mask_T, x)
    check_capacity(spec.router, capacity)
    check_open(x_TD, spec.router, capacity=capacity, align=align, num_token_chunks=num_token_chunks)
    if batch_invariant:
        check_batch_invariant(spec.router, capacity)
        inputs.check(spec.router, x_TD.shape[0])
        layer = partial(
            sparse_matmul, params=params, spec=spec, align=align, num_emb_chunks=num_emb_chunks, precision=precision,
            implementation=implementation,
        )  # fmt: skip
        output_TD, decided = of_each_token(layer, x_TD, token_mask_T, inputs, spec.router)
        return like_tokens(output_TD, x), decided
    clean_x_TD = keep_tokens(x_TD, token_mask_T)
    logits_TE = routing.gate(clean_x_TD, params.gate_ED, params.gate_bias_E, spec=spec.router)
    decided, metadata = route_tokens(
        logits_TE,
        spec.router,
        expert_bias_E=params.expert_bias_E,
        learned_scale=params.learned_scale,
        token_mask_T=token_mask_T,
        inputs=inputs,
    )
    if capacity is not None:
        sequence_of_T, num_sequences = sequences_of(x, sequence_of_T, num_sequences)
        decided, metadata = limit(
            decided, capacity, spec.router.num_experts, token_mask_T=token_mask_T, sequence_of_T=sequence_of_T,
            num_sequences=num_sequences, axis_name=axis_name,
        )  # fmt: skip
    expert_input_TD = compress(clean_x_TD, params, precision=precision)
    compute = partial(
        run_experts, spec=spec, num_emb_chunks=num_emb_chunks, precision=precision, implementation=implementation
    )
    if num_token_chunks == 1:
        own = metadata if align is None else align_rows(metadata, align)
        combined_TD = compute(expert_input_TD, params, decided, own)
    else:
        combined_TD = _in_token_chunks(compute, expert_input_TD, params, decided, spec.router, num_token_chunks, align)
    routed_TD = expand(combined_TD, params, spec, precision=precision)
    output_TD = join(routed_TD, clean_x_TD, decided.shared_weights_TS, params, spec, precision=precision)
    return like_tokens(keep_tokens(output_TD, token_mask_T), x), decided


def route_tokens(logits_TE: jax.Array, spec: RouterSpec, **inputs: Any) -> tuple[RouteOutput, RouteMetadata]:
    """The experts of each token, their weights, and where the rows go; `inputs` are those of `routing.route`."""
    trace = routing.route(logits_TE, spec, **inputs)
    decided = RouteOutput(
        expert_ids_TK=trace.expert_ids_TK,
        weights_TK=trace.weights_TK,
        scores_TE=trace.scores_TE,
        shared_weights_TS=trace.shared_weights_TS,
        logits_TE=trace.logits_TE,
        chosen_ids_TK=trace.expert_ids_TK,
    )
    return decided, permute(trace.expert_ids_TK, spec.num_experts, most_rows=most_rows(logits_TE.shape[0], spec))


def most_rows(num_tokens: int, spec: RouterSpec) -> int | None:
    """How many slots of so many tokens have an expert at most, where a selector leaves most of them unused."""
    return spec.num_experts * spec.takes(num_tokens) if spec.selector == "expert_choice" else None


def limit(
    decided: RouteOutput, capacity: CapacitySpec, num_experts: int, **inputs: Any
) -> tuple[RouteOutput, RouteMetadata]:
    """What is left of a choice, and where those rows go; `inputs` are those of `apply_capacity`."""
    slots = apply_capacity(decided.expert_ids_TK, decided.weights_TK, capacity, num_experts, **inputs)
    kept = replace(decided, expert_ids_TK=slots.expert_ids_TK, weights_TK=slots.weights_TK)
    return kept, permute(slots.expert_ids_TK, num_experts)


def gmm_up(
    rows_RD: jax.Array, w_gate_EDF: ArrayLike | None, w_up_EDF: ArrayLike, metadata: RouteMetadata, **options: Any
) -> tuple[jax.Array | None, jax.Array]:
    """Rows times the gate and the up matrix of their expert; linear in the rows, so parts of D may be summed.

    Args:
        w_gate_EDF: None where experts are not gated.
        options: of `grouped_matmul`.

    Returns:
        gate_RF, up_RF: gate_RF is None where experts are not gated.
    """
    gate_RF = None
    if w_gate_EDF is not None:
        gate_RF = grouped_matmul(rows_RD, w_gate_EDF, metadata.group_sizes_E, **options)
    return gate_RF, grouped_matmul(rows_RD, w_up_EDF, metadata.group_sizes_E, **options)


def activate(
    gate_RF: jax.Array | None, up_RF: jax.Array, params: LayerParams, metadata: RouteMetadata, spec: ExpertSpec
) -> jax.Array:
    """The biases join the finished projections, then the activation; returns hidden_RF."""
    biased_gate_RF = None if gate_RF is None else _add_bias(gate_RF, params.b_gate_EF, metadata)
    return hide(biased_gate_RF, _add_bias(up_RF, params.b_up_EF, metadata), spec)


def gmm_down(
    hidden_RF: jax.Array, w_down_EFD: ArrayLike, b_down_ED: ArrayLike | None, metadata: RouteMetadata, **options: Any
) -> jax.Array:
    """Rows times the down matrix of their expert, plus its bias; rows of the tail are 0."""
    rows_RD = grouped_matmul(hidden_RF, w_down_EFD, metadata.group_sizes_E, **options)
    return _add_bias(rows_RD, b_down_ED, metadata)


def run_experts(
    x_TD: jax.Array,
    params: LayerParams,
    decided: RouteOutput,
    metadata: RouteMetadata,
    *,
    spec: LayerSpec,
    num_emb_chunks: int = 1,
    **options: Any,
) -> jax.Array:
    """The weighted sum of what the experts make of x_TD, which may be a latent: from dispatch to the null experts."""
    router, chunks = spec.router, _chunks(x_TD.shape[1], num_emb_chunks)
    sum_options = dict(options)
    if num_emb_chunks > 1:
        # Parts are summed before they are rounded to the dtype of the tokens.
        sum_options["preferred_element_type"] = jnp.promote_types(x_TD.dtype, jnp.float32)

    def part(chunk):
        rows_RD = dispatch(x_TD[:, chunk], metadata)
        if router.weight_on == "input":
            rows_RD *= metadata.of_rows(decided.weights_TK)[:, None].astype(x_TD.dtype)
        w_gate_EDF = None if params.w_gate_EDF is None else params.w_gate_EDF[:, chunk]
        return gmm_up(rows_RD, w_gate_EDF, params.w_up_EDF[:, chunk], metadata, **sum_options)

    gate_RF, up_RF = reduce(partial(jax.tree.map, jnp.add), map(part, chunks))
    hidden_RF = activate(gate_RF, up_RF, params, metadata, spec.experts).astype(x_TD.dtype)

    # A weight that is on the input is not applied again.
    weights_TK = decided.weights_TK if router.weight_on == "output" else None
    outputs = []
    for chunk in chunks:
        b_down_ED = None if params.b_down_ED is None else params.b_down_ED[:, chunk]
        rows_RD = gmm_down(hidden_RF, params.w_down_EFD[:, :, chunk], b_down_ED, metadata, **options)
        outputs.append(unpermute(rows_RD, metadata, weights_TK))
    summed_TD = jnp.concatenate(outputs, axis=-1) + null_output(
        x_TD, decided.expert_ids_TK, decided.weights_TK, params, router
    )
    return summed_TD * router.output_scale


def _in_token_chunks(
    compute, x_TD, params: LayerParams, decided: RouteOutput, router: RouterSpec, num_chunks: int,
    align: AlignSpec | None,
):  # fmt: skip
    """Chunks of tokens, one after the other, each with the rows of its own slots; the routing is not repeated."""
    T = x_TD.shape[0]
    if T % num_chunks:
        raise ValueError(f"num_token_chunks is {num_chunks}, which does not divide the {T} tokens")
    by_chunk = jax.tree.map(lambda a: a.reshape(num_chunks, T // num_chunks, *a.shape[1:]), (x_TD, decided))

    def one_chunk(chunk):
        chunk_x_TD, chunk_decided = chunk
        # A chunk may have all that is taken.
        metadata = permute(chunk_decided.expert_ids_TK, router.num_experts, most_rows=most_rows(T, router))
        own = metadata if align is None else align_rows(metadata, align)
        return compute(chunk_x_TD, params, chunk_decided, own)

    return lax.map(one_chunk, by_chunk).reshape(x_TD.shape)


def _chunks(size: int, num_chunks: int) -> list[slice]:
    """Equal parts of an axis; one part is the whole."""
    if num_chunks < 1 or size % num_chunks:
        raise ValueError(f"num_emb_chunks is {num_chunks}, which does not divide the model dim, {size}")
    width = size // num_chunks
    return [slice(i * width, (i + 1) * width) for i in range(num_chunks)]


def _add_bias(rows, bias, metadata: RouteMetadata):
    """Each row plus the bias of its expert; rows of the tail get none, and give it no gradient."""
    if bias is None:
        return rows
    # The tail reads a row of zeros past the last expert. The sum over rows in the gradient is in float32 at least.
    bias_array = jnp.asarray(bias)
    padded = jnp.pad(bias_array.astype(jnp.promote_types(bias_array.dtype, jnp.float32)), ((0, 1), (0, 0)))
    row_biases = padded.at[metadata.expert_of_row_R].get(mode="promise_in_bounds", indices_are_sorted=True)
    return rows + row_biases.astype(rows.dtype)
