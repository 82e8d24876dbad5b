"""moe_torch, sparsity: the coefficient of an L1 loss, moved by how many experts tokens had.

What is computed is `moe_ref.next_coefficient`; nothing here reads the device. A loss of coeff 1 is multiplied by it.

Legend: L layers, E experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ref.specs.sparsity import SparsitySpec


def next_coefficient(
    coeff: Tensor,
    counts_LE: Tensor,
    num_tokens: Tensor | int,
    spec: SparsitySpec,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The coefficient is multiplied by factor where tokens had more experts than they are to, else divided. [LOD-49]

    Args:
        coeff: (), before.
        counts_LE: (L, E) integers, the slots of each expert in each layer, over the micro-batches of the step.
        num_tokens: (), their valid tokens, each of which all layers saw.
        spec: the target, and the factor.
        group: the ranks over which the tokens are spread; None: this process alone.

    Returns:
        (), in the dtype of coeff.
    """
    excess = counts_LE.long().sum() - spec.target_top_k * len(counts_LE) * torch.as_tensor(num_tokens).to(coeff.device)
    if group is not None:
        dist.all_reduce(excess, group=group)
    return torch.where(excess > 0, coeff * spec.factor, coeff / spec.factor)
