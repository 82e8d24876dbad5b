"""moe_ref, sparsity: the coefficient of an L1 loss, moved by how many experts tokens had.

Legend: L layers, E experts.
"""

import numpy as np

from moe_ref.specs.checks import array, entries, integer, number
from moe_ref.specs.sparsity import SparsitySpec


def next_coefficient(coeff: float, counts_LE: np.ndarray, num_tokens: int, spec: SparsitySpec) -> float:
    """The coefficient is multiplied by factor where tokens had more experts than they are to, else divided. [LOD-49]

    Args:
        coeff: before.
        counts_LE: (L, E) integers, the slots of each expert in each layer, summed over the ranks and micro-batches of
            the step.
        num_tokens: valid tokens of the step, each of which all layers saw.
        spec: the target, and the factor.

    Returns:
        The coefficient of the next step.

    Raises:
        ValueError: coeff is not above 0, or a count or num_tokens is negative.
    """
    number("coeff", coeff, above=0.0)
    counts_LE = array("counts_LE", counts_LE, (None, None), kind="int").astype(np.int64)
    entries("counts_LE", counts_LE, counts_LE >= 0, "counts are at least 0")
    integer("num_tokens", num_tokens, 0)
    # In whole numbers: a share that is rounded may fall on either side of the target.
    too_many = int(counts_LE.sum()) > spec.target_top_k * num_tokens * len(counts_LE)
    return coeff * spec.factor if too_many else coeff / spec.factor
