"""moe_ref, the batch-invariant mode: what a token's output is when its bits depend on no other token.

The sums of a matrix product are in the order that its kernel likes, and kernels are chosen by the number of rows. The
bits of a token are its own where it is computed alone; an implementation may be faster, and has to return one answer.

Legend: T tokens, D model dim.
"""

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.layer import moe_layer
from moe_ref.specs.checks import array, mask_array
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.invariant import check_batch_invariant
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


def layer_of_each(
    x_TD: np.ndarray,
    params: LayerParams,
    spec: LayerSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    inputs: RouterInputs = NO_INPUTS,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """(T, D): the output of each token, computed alone. [LAY-23]

    Args:
        x_TD, params, spec, token_mask_T, inputs, dtype: as in `moe_layer`.

    Raises:
        ValueError: as there; and where a choice depends on the batch.
    """
    check_batch_invariant(spec.router, None)
    T, _ = array("x_TD", x_TD, (None, spec.experts.dim)).shape
    mask_T = mask_array(token_mask_T, T)
    inputs.check(spec.router, T)
    alone = inputs.shards(spec.router, [1] * T)
    rows = [
        moe_layer(x_TD[[t]], params, spec, token_mask_T=mask_T[[t]], inputs=alone[t], dtype=dtype).output_TD
        for t in range(T)
    ]
    return np.concatenate([*rows, np.zeros((0, spec.experts.dim), dtype)])
