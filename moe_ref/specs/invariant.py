"""moe_ref, the batch-invariant mode: which layers have one."""

from moe_ref.specs.balance import CapacitySpec
from moe_ref.specs.checks import require
from moe_ref.specs.router import RouterSpec

CHOOSE_ALONE = ("top_k", "group_top_k", "sparsemixer", "table", "given", "round_robin", "threshold", "top_p")
"""Selectors whose choice for a token depends on no other token; 'round_robin' on its place alone."""


def check_batch_invariant(router: RouterSpec, capacity: CapacitySpec | None) -> None:
    """Nothing that a layer chooses for a token depends on another one.

    Raises:
        ValueError: the selector draws for a whole batch, or there is a capacity.
    """
    require(
        router.selector in CHOOSE_ALONE,
        f"selector is {router.selector!r} and batch_invariant True; then it is one of {CHOOSE_ALONE}",
    )
    require(capacity is None, f"capacity is {capacity} and batch_invariant True; what it drops depends on the batch")
