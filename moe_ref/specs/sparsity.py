"""moe_ref, the spec of sparsity: how the coefficient of a loss follows how many experts tokens have, as data."""

from dataclasses import dataclass

from moe_ref.specs.base import Spec
from moe_ref.specs.checks import integer, number


@dataclass(frozen=True, kw_only=True)
class SparsitySpec(Spec):
    """How the coefficient of an L1 loss moves after a step, so that tokens have target_top_k experts in the mean.

    Where they had more, the share of zeros among all scores is below 1 - target_top_k / E, and the coefficient is
    multiplied by `factor`; otherwise, at exactly the target too, it is divided by it. Source: training.py of
    thu-ml/ReMoE (arXiv:2412.14711), which averages over layers, micro-batches and ranks; it starts at 1e-8 there.

    Raises:
        ValueError: a field is out of its range.
    """

    target_top_k: int
    """Experts that a token is to have in the mean (moe_router_topk)."""
    factor: float = 1.2
    """alpha (moe_relu_l1_reg_coeff_multiplier)."""

    def __post_init__(self):
        super().__post_init__()
        integer("target_top_k", self.target_top_k, 1)
        number("factor", self.factor, above=1.0)
