"""conformance, suite: every order of a few experts. Exhaustive where the other files are random."""

import pytest

from conformance.core.judge import CHECKS
from conformance.router.small_worlds import BASES, world, worlds
from moe_ref import RouterSpec


def first_supported(judge, sizes: dict) -> RouterSpec | None:
    """The spec of these sizes that the subject supports, with the plainest other fields."""
    specs = (RouterSpec(**base, **sizes) for base in BASES)
    return next((spec for spec in specs if judge.subject.supports(spec) is None), None)


def hold_worlds(judge, ids: tuple[str, ...], *, grouped: bool) -> None:
    if "route" not in judge.capabilities:
        pytest.skip("unsupported: route() is not defined")
    found = [first_supported(judge, sizes) for sizes in worlds() if ("num_expert_groups" in sizes) == grouped]
    specs = [spec for spec in found if spec is not None][:: 4 if judge.subject.compiles else 1]
    if not specs:
        pytest.skip(f"unsupported: no {'grouped' if grouped else 'ungrouped'} world")
    for spec in specs:
        case = world(spec)
        for id in ids:
            judge.examine(CHECKS[id], case)


def test_every_order_of_few_experts(judge):
    hold_worlds(judge, ("SEL-1", "SEL-2"), grouped=False)


def test_every_lattice_point_of_few_groups(judge):
    hold_worlds(judge, ("SEL-1", "GRP-2", "GRP-1", "SEL-2"), grouped=True)
