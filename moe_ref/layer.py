"""moe_ref, the layer: start reading here. One Mixture-of-Experts layer, every stage in order.

    gate -> score -> limit_groups -> select -> weigh -> permute -> dispatch -> experts -> combine (+ shared experts)

A capacity, where there is one, stands between weigh and permute. A latent is made before dispatch, and left after
combine (`latent.py`).

Legend: T tokens, D model dim, E experts, K top_k, N rows, F expert hidden dim, S shared experts. Of what the experts
see and return D is the latent dim, H, where there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.align import run_aligned
from moe_ref.capacity import CapacityTrace, apply_capacity
from moe_ref.constants import fill_constants
from moe_ref.experts import (
    FeedForwardTrace,
    combine,
    fill_slots,
    join,
    run_experts,
    run_shared,
    share_weights,
    sum_shared,
    weigh_inputs,
)
from moe_ref.latent import LatentTrace, compress, expand
from moe_ref.permute import Permutation, dispatch, permute
from moe_ref.rounding import dtype_of_router
from moe_ref.routing import RoutingTrace, gate, route
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import CapacitySpec, check_capacity
from moe_ref.specs.checks import array, mask_array
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """Every intermediate of `moe_layer`, under the name it keeps everywhere."""

    x_TD: np.ndarray
    """The tokens; padding rows are 0, whatever they held."""
    token_mask_T: np.ndarray
    routing: RoutingTrace
    capacity: CapacityTrace | None
    """What was kept and dropped; None without a capacity."""
    expert_ids_TK: np.ndarray
    """What the experts work on: the choice, less what was dropped."""
    weights_TK: np.ndarray
    """The weights of those."""
    permutation: Permutation
    slot_inputs_TKD: np.ndarray
    experts: FeedForwardTrace
    """All N rows, sorted by expert: `input_RD` is what the experts see, `output_RD` what they return."""
    slot_outputs_TKD: np.ndarray
    """Before the weights, unless they are on the input."""
    latent: LatentTrace | None
    """What the experts see, and their sum on its way back to a token; None without a latent."""
    routed_TD: np.ndarray
    shared_factors_TS: np.ndarray
    """S is 0 without shared experts."""
    shared_experts: tuple[FeedForwardTrace, ...]
    shared_TD: np.ndarray
    """0 without shared experts."""
    output_TD: np.ndarray


def moe_layer(
    x_TD: np.ndarray,
    params: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    inputs: RouterInputs = NO_INPUTS,
    capacity: CapacitySpec | None = None,
    align: AlignSpec | None = None,
    sequence_lengths: Sequence[int] | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> LayerTrace:
    """One MoE layer, every stage in order; the trace keeps all of them. [LAY-2, LAY-6, LAY-7]

    Args:
        x_TD: (T, D) tokens; T may be 0.
        params: the parameters, with the shapes that the spec asks for.
        spec: what is computed.
        token_mask_T: (T,) bools; a padding token (False) is not read, and its output is 0, shared experts included.
        inputs: as in `moe_ref.route`, for the selectors that read them.
        capacity: what each expert takes; None: all. The later stages see a dropped slot as an unused one.
        align: the experts see their rows padded up to a multiple; None: as they are. No output depends on it.
        sequence_lengths, tokens_per_shard: as in `moe_ref.apply_capacity`, for the capacities that need them.
        dtype: of every stage; the specification is float64.

    Raises:
        ValueError: wrong shapes, dtypes or values; it names field, value and bound.
    """
    params.check(spec)
    check_capacity(spec.router, capacity)
    params = params.astype(dtype)
    given_x_TD = array("x_TD", x_TD, (None, spec.experts.dim)).astype(dtype)
    mask_T = mask_array(token_mask_T, len(given_x_TD))
    # 0 * NaN is NaN: a padding row is replaced, not multiplied by a mask.
    x_TD = np.where(mask_T[:, None], given_x_TD, 0)

    gate_dtype = dtype_of_router(spec.router, dtype)
    logits_TE = gate(x_TD, params.gate_ED, params.gate_bias_E, dtype=gate_dtype)
    routing = route(
        logits_TE,
        spec.router,
        expert_bias_E=params.expert_bias_E,
        learned_scale=params.learned_scale,
        inputs=inputs,
        token_mask_T=mask_T,
        dtype=dtype,
    )
    ids_TK, weights_TK, kept = routing.expert_ids_TK, routing.weights_TK.astype(dtype), None
    if capacity is not None:
        kept = apply_capacity(
            ids_TK, weights_TK, capacity, spec.router.num_experts, token_mask_T=mask_T,
            sequence_lengths=sequence_lengths, tokens_per_shard=tokens_per_shard,
        )  # fmt: skip
        ids_TK, weights_TK = kept.expert_ids_TK, kept.weights_TK
    permutation = permute(ids_TK, spec.router.num_experts)
    expert_input_TD = compress(x_TD, params)
    slot_inputs_TKD = weigh_inputs(expert_input_TD, weights_TK, spec.router)
    rows_ND = dispatch(slot_inputs_TKD, permutation.order_N)
    if align is None:
        experts = run_experts(rows_ND, permutation.tokens_per_expert_E, params, spec.experts)
    else:
        experts = run_aligned(rows_ND, permutation, params, spec.experts, align)
    slot_outputs_TKD = fill_slots(experts.output_RD, permutation.order_N, slot_inputs_TKD, ids_TK, spec.router)
    slot_outputs_TKD = fill_constants(slot_outputs_TKD, slot_inputs_TKD, ids_TK, params, spec.router)
    latent = expand(expert_input_TD, combine(slot_outputs_TKD, weights_TK, spec.router), params, spec)
    routed_TD = latent.routed_TD

    shared_factors_TS = np.where(mask_T[:, None], share_weights(x_TD, routing.shared_weights_TS, params, spec), 0)
    shared_experts = run_shared(x_TD, params, spec)
    shared_TD = sum_shared(shared_experts, shared_factors_TS, x_TD)
    output_TD = join(routed_TD, shared_TD, spec)

    return LayerTrace(
        x_TD=x_TD,
        token_mask_T=mask_T,
        routing=routing,
        capacity=kept,
        expert_ids_TK=ids_TK,
        weights_TK=weights_TK,
        permutation=permutation,
        slot_inputs_TKD=slot_inputs_TKD,
        experts=experts,
        slot_outputs_TKD=slot_outputs_TKD,
        latent=None if spec.latent is None else latent,
        routed_TD=routed_TD,
        shared_factors_TS=shared_factors_TS,
        shared_experts=shared_experts,
        shared_TD=shared_TD,
        output_TD=output_TD,
    )
