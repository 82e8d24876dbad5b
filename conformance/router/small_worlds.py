"""conformance, router, small worlds: every order of a few experts, every point of a small lattice, as rows of one case.

Selection depends on the order of the choice scores alone. For few experts every order can be tried, ties included:
all weak orderings of E <= 7 (47,293 of them for E = 7). Group scores are sums, so there every point of a lattice
is tried: three levels up to E = 6, two for E = 8. What this covers needs no luck. It leaves out more experts, more
levels, and biases.
"""

from collections.abc import Iterator

import numpy as np

from conformance.core.judge import Judge
from conformance.router.case import RouterCase
from moe_ref import RouterSpec

LARGEST_ORDERING = 7
GROUPED = ((4, 2, 3), (6, 2, 3), (6, 3, 3), (8, 2, 2), (8, 4, 2))
"""(num_experts, num_expert_groups, levels)"""

BASES: tuple[dict, ...] = (
    {"score_func": "sigmoid"},
    {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20},
    {"score_func": "softmax"},
    {"score_func": "softmax", "route_norm": True},
    {"score_over": "selected", "select_by": "logit"},
)
"""The other fields of the spec; a subject gets the first that it supports."""


def lattice(num_experts: int, levels: int) -> np.ndarray:
    """(levels ** E, E): every assignment of levels to experts."""
    return np.indices((levels,) * num_experts).reshape(num_experts, -1).T


def weak_orderings(num_experts: int) -> np.ndarray:
    """(rows, E) ranks 0, 1, .. without gaps: every order of E experts, ties included."""
    ranks = lattice(num_experts, num_experts)
    in_order = np.sort(ranks, axis=1)
    return ranks[(in_order[:, 0] == 0) & (np.diff(in_order, axis=1) <= 1).all(axis=1)]


def worlds() -> list[dict]:
    """Every valid (E, K) and (E, K, G, L, group_score_k) of the small worlds."""
    found = [{"num_experts": E, "top_k": K} for E in range(1, LARGEST_ORDERING + 1) for K in range(1, E + 1)]
    for E, G, _ in GROUPED:
        P = E // G
        found += [
            {"num_experts": E, "top_k": K, "num_expert_groups": G, "num_limited_groups": L, "group_score_k": k}
            for L in range(1, G + 1)
            for k in range(1, P + 1)
            for K in range(1, L * P + 1)
        ]
    return found


def world(spec: RouterSpec) -> RouterCase:
    """Every row of a spec's world as one case. Half units: no score function maps two of them to one float32."""
    if spec.num_expert_groups is None:
        levels_TE = weak_orderings(spec.num_experts)
    else:
        levels = next(n for E, G, n in GROUPED if (spec.num_experts, spec.num_expert_groups) == (E, G))
        levels_TE = lattice(spec.num_experts, levels)
    return RouterCase(spec=spec, logits_TE=(levels_TE - 1) * 0.5)


JUDGED = {False: ("SEL-1", "SEL-2"), True: ("SEL-1", "GRP-2", "GRP-1", "SEL-2")}
"""Whether there are groups -> the requirements that every row of a world is held against."""


def worlds_of(judge: Judge) -> Iterator[tuple[str, RouterCase]]:
    """(requirement, world) of every world that the subject supports; a fourth of them where each is a compilation."""
    if "route" not in judge.capabilities:
        return
    for grouped, requirements in JUDGED.items():
        found = [first_supported(judge, sizes) for sizes in worlds() if ("num_expert_groups" in sizes) == grouped]
        for spec in [spec for spec in found if spec is not None][:: 4 if judge.subject.compiles else 1]:
            case = world(spec)
            yield from ((requirement, case) for requirement in requirements)


def first_supported(judge: Judge, sizes: dict) -> RouterSpec | None:
    """The spec of these sizes that the subject supports, with the plainest other fields."""
    specs = (RouterSpec(**base, **sizes) for base in BASES)
    return next((spec for spec in specs if judge.subject.supports(spec) is None), None)
