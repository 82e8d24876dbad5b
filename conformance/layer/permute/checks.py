"""conformance, suite: permute. Slots become rows sorted by expert."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer.verdicts import permuted, unused_or_null
from moe_ref import UNUSED
from moe_ref.permute import permute as reference_permute

MANY_EXPERTS, MANY_TOKENS = 520, 300
"""Past 256 and 512, where a warp, a byte or a bfloat16 ends; no multiple of a block."""


def any_ids(case) -> np.ndarray:
    """Distinct choices for each token; in half of the cases a few experts get all tokens, and others none."""
    rng, router = case.rng(), case.spec.router
    order_TE = rng.random((case.num_tokens, router.num_choices))
    if rng.random() < 0.5:
        order_TE[:] = order_TE[:1]
    return np.argsort(order_TE, axis=-1)[:, : router.top_k]


def with_unused(case, share: float) -> np.ndarray:
    """The same with unused slots."""
    ids_TK = any_ids(case)
    return np.where(case.rng().random(ids_TK.shape) < share, UNUSED, ids_TK)


def wanted(expert_ids_TK, num_experts: int):
    """The reference's permutation."""
    return reference_permute(expert_ids_TK, num_experts)


def hold_rows(case, expert_ids_TK, num_experts: int, order_N, id: str) -> None:
    """Each slot of an expert is a row once, and no other slot is."""
    used = set(np.flatnonzero(~unused_or_null(expert_ids_TK, num_experts).reshape(-1)).tolist())
    found = order_N.tolist()
    K = expert_ids_TK.shape[1]

    def accuse(title: str, slot: int):
        token = slot // K if 0 <= slot < expert_ids_TK.size else None
        expected = f"{len(used)} rows, each slot of an expert once; ids {expert_ids_TK.tolist()}"
        raise Violation(id, case, title, token=token, expected=shorten(expected), received=shorten(found))

    for slot in sorted(used - set(found)):
        accuse(f"slot {slot % K} is no row", slot)
    for slot in sorted(set(found) - used):
        accuse(f"slot {slot} is a row, but no expert's slot", slot)
    if len(found) != len(used):
        accuse("a slot is several rows", next(slot for slot in found if found.count(slot) > 1))


def hold_sorted(case, expert_ids_TK, order_N, id: str) -> None:
    """The experts of the rows ascend."""
    experts_N = expert_ids_TK.reshape(-1)[order_N]
    for row in np.flatnonzero(np.diff(experts_N) < 0):
        raise Violation(
            id,
            case,
            f"row {row + 1} is of a lower expert than row {row}",
            token=int(order_N[row + 1]) // expert_ids_TK.shape[1],
            expected="experts in ascending order",
            received=shorten(experts_N.tolist()),
        )


def hold_counts(case, expert_ids_TK, num_experts: int, counts_E, id: str) -> None:
    """The counts are the reference's."""
    wanted_E = wanted(expert_ids_TK, num_experts).tokens_per_expert_E
    for expert in np.flatnonzero(counts_E != wanted_E):
        raise Violation(
            id,
            case,
            f"expert {expert} has {wanted_E[expert]} rows, not {counts_E[expert]}",
            expected=shorten(wanted_E.tolist()),
            received=shorten(counts_E.tolist()),
        )


def shorten(value) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def in_range(case, expert_ids_TK, order_N) -> np.ndarray:
    """The order, where PRM-2 has nothing to say against its slots."""
    if ((order_N < 0) | (order_N >= expert_ids_TK.size)).any():
        raise NotRun("judged where every row is a slot")
    return order_N


@requires("PRM-1", method="permute")
def test_permute_runs_and_returns_integers(judge, case):
    permuted(judge, case, any_ids(case), case.spec.router.num_experts, "PRM-1")


@requires("PRM-2", method="permute", after=("PRM-1",))
def test_every_slot_of_an_expert_is_a_row_once(judge, case):
    ids_TK, E = any_ids(case), case.spec.router.num_experts
    order_N, _ = permuted(judge, case, ids_TK, E, "PRM-2")
    hold_rows(case, ids_TK, E, order_N, "PRM-2")


@requires("PRM-3", method="permute", after=("PRM-1", "PRM-2"))
def test_rows_are_sorted_by_expert(judge, case):
    ids_TK = any_ids(case)
    order_N, _ = permuted(judge, case, ids_TK, case.spec.router.num_experts, "PRM-3")
    hold_sorted(case, ids_TK, in_range(case, ids_TK, order_N), "PRM-3")


@requires("PRM-4", method="permute", after=("PRM-1",))
def test_counts_are_exact(judge, case):
    ids_TK, E = any_ids(case), case.spec.router.num_experts
    # Other ids in between: a buffer that is not cleared keeps their counts.
    other_ids_TK = any_ids(case.with_(seed=case.seed + 1))
    for each_TK in (ids_TK, other_ids_TK, ids_TK):
        _, counts_E = permuted(judge, case, each_TK, E, "PRM-4")
        hold_counts(case, each_TK, E, counts_E, "PRM-4")


@requires("PRM-5", method="permute", after=("PRM-1", "PRM-2", "PRM-3"))
def test_rows_of_an_expert_are_in_token_order(judge, case):
    ids_TK, E = any_ids(case), case.spec.router.num_experts
    order_N, _ = permuted(judge, case, ids_TK, E, "PRM-5")
    wanted_N = wanted(ids_TK, E).order_N
    if len(order_N) == len(wanted_N) and (order_N != wanted_N).any():
        row = int(np.flatnonzero(order_N != wanted_N)[0])
        raise Violation("PRM-5", case, f"row {row} is slot {order_N[row]}", expected=shorten(wanted_N.tolist()),
                        received=shorten(order_N.tolist()))  # fmt: skip


@requires("PRM-6", method="permute", after=("PRM-1", "PRM-2", "PRM-3", "PRM-4"))
def test_an_unused_slot_is_no_row(judge, case):
    E = case.spec.router.num_experts
    for share in (0.4, 1.0):
        ids_TK = with_unused(case, share)
        order_N, counts_E = permuted(judge, case, ids_TK, E, "PRM-6")
        hold_rows(case, ids_TK, E, order_N, "PRM-6")
        hold_sorted(case, ids_TK, order_N, "PRM-6")
        hold_counts(case, ids_TK, E, counts_E, "PRM-6")


@requires("PRM-7", method="permute", after=("PRM-1", "PRM-2", "PRM-3", "PRM-4"), tokens=(7,))
def test_many_experts_and_many_rows_are_sorted_and_counted(judge, case):
    rng, K = case.rng(), case.spec.router.top_k
    spread_TK = np.argsort(rng.random((7, MANY_EXPERTS)), axis=-1)[:, :K]
    few = case.spec.router.num_experts
    crowded_TK = np.tile(rng.permutation(few)[: min(K, few)], (MANY_TOKENS, 1))
    for ids_TK, E in ((spread_TK, MANY_EXPERTS), (crowded_TK, few)):
        order_N, counts_E = permuted(judge, case, ids_TK, E, "PRM-7")
        hold_rows(case, ids_TK, E, order_N, "PRM-7")
        hold_sorted(case, ids_TK, order_N, "PRM-7")
        hold_counts(case, ids_TK, E, counts_E, "PRM-7")


@requires("PRM-8", method="permute", tokens=(0,))
def test_zero_tokens_are_no_rows(judge, case):
    ids_TK, E = np.zeros((0, case.spec.router.top_k), dtype=np.int64), case.spec.router.num_experts
    order_N, counts_E = permuted(judge, case, ids_TK, E, "PRM-8")
    hold_rows(case, ids_TK, E, order_N, "PRM-8")
    hold_counts(case, ids_TK, E, counts_E, "PRM-8")
