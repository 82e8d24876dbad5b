"""moe_ref, the fused form: shared experts in slots of their own behind the routed ones (`specs/fused.py`).

Legend: T tokens, K top_k, S slots of shared experts, D model dim, E routed experts.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.layer import moe_layer
from moe_ref.permute import permute
from moe_ref.specs.fused import fuse_params, fused_spec, fused_weight, num_fused
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


def fuse_routing(
    expert_ids_TK: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec, *, token_mask_T: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(T, K + S) ids and weights: E .. E+S-1 behind a token's own, with the weight of 1 / output_scale. [LAY-25]

    A padding token has none: ids -1 and weights 0.
    """
    T, S = len(expert_ids_TK), num_fused(spec)
    ids_TS = np.tile(spec.router.num_experts + np.arange(S), (T, 1))
    weights_TS = np.full((T, S), fused_weight(spec), weights_TK.dtype)
    if token_mask_T is not None:
        ids_TS = np.where(token_mask_T[:, None], ids_TS, UNUSED)
        weights_TS = np.where(token_mask_T[:, None], weights_TS, 0)
    return np.concatenate([expert_ids_TK, ids_TS], axis=1), np.concatenate([weights_TK, weights_TS], axis=1)


def fused_layer(
    x_TD: np.ndarray,
    params: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    dtype: DTypeLike = np.float64,
    **inputs: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The layer in its fused form, and its counts, which are those of the E routed experts. [LAY-25, LAY-26]

    Args:
        x_TD, params, spec: of the layer with its shared experts beside it.
        token_mask_T, dtype, inputs: as in `moe_layer`, but for a capacity.

    Returns:
        output_TD, tokens_per_expert_E.

    Raises:
        ValueError: the layer has no fused form.
    """
    routing = moe_layer(x_TD, params, spec, token_mask_T=token_mask_T, dtype=dtype, **inputs).routing
    ids, weights = fuse_routing(routing.expert_ids_TK, routing.weights_TK, spec, token_mask_T=token_mask_T)
    given = RouterInputs(given_ids_TK=ids, given_weights_TK=weights)
    fused, own = fused_spec(spec), fuse_params(params, spec)
    trace = moe_layer(x_TD, own, fused, token_mask_T=token_mask_T, inputs=given, dtype=dtype)
    return trace.output_TD, permute(routing.expert_ids_TK, spec.router.num_experts).tokens_per_expert_E
