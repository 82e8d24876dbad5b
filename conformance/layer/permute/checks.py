"""conformance, layer: permute. Slots become rows sorted by expert, and rows aligned to a multiple.

Legend: T tokens, K top_k, E experts, N used slots, A aligned rows.
"""

from collections.abc import Iterator

import numpy as np

from conformance.core.judge import Judge, accuse
from conformance.core.show import shortened, spec_fields
from conformance.layer.case import LayerCase
from conformance.layer.draw import ALIGNS
from conformance.layer.kind import requires
from conformance.layer.verdicts import aligned_of_subject, permutation_of_subject
from moe_ref import UNUSED, AlignSpec, align_rows, permute

MANY_EXPERTS, MANY_TOKENS = 520, 300
"""Past 256 and 512, where a warp, a byte or a bfloat16 ends; no multiple of a block."""
PAST_16_BITS = (21_846, 3, 257)
"""(T, K, E): T * K is 65,538."""
MOST_TOKENS = 50
MOST_CHARACTERS = 200
"""Of ids, rows and counts on a page."""


def any_ids(case: LayerCase) -> np.ndarray:
    """Distinct choices for each token; in half of the cases a few experts get all tokens, and others none."""
    rng, router = case.rng(), case.spec.router
    order_TE = rng.random((case.num_tokens, router.num_choices))
    if rng.random() < 0.5:
        order_TE[:] = order_TE[:1]
    return np.argsort(order_TE, axis=-1)[:, : router.top_k]


def ids_with_unused(case: LayerCase, share: float) -> np.ndarray:
    """The same with unused slots."""
    ids_TK = any_ids(case)
    return np.where(case.rng().random(ids_TK.shape) < share, UNUSED, ids_TK)


def hold_rows(expert_ids_TK: np.ndarray, num_experts: int, order_N: np.ndarray) -> None:
    """Each slot of an expert is a row once, and no other slot is."""
    ids_N, K = expert_ids_TK.reshape(-1), expert_ids_TK.shape[1]
    used_N = np.flatnonzero((ids_N != UNUSED) & (ids_N < num_experts))
    if np.array_equal(np.sort(order_N), used_N):
        return  # of tens of thousands of slots the rest takes long

    def accuse_slot(title: str, slot: int) -> None:
        token = slot // K if 0 <= slot < len(ids_N) else None
        expected = f"{len(used_N)} rows, each slot of an expert once; ids {expert_ids_TK[:MOST_TOKENS].tolist()}"
        accuse(title, token=token, expected=shown(expected), received=shown(order_N[:MOST_CHARACTERS].tolist()))

    for slot in np.setdiff1d(used_N, order_N)[:1].tolist():
        accuse_slot(f"slot {slot % K} is no row", slot)
    for slot in np.setdiff1d(order_N, used_N)[:1].tolist():
        accuse_slot(f"slot {slot} is a row, but no expert's slot", slot)
    slots, times = np.unique(order_N, return_counts=True)
    for slot in slots[times > 1][:1].tolist():
        accuse_slot("a slot is several rows", slot)


def hold_sorted(expert_ids_TK: np.ndarray, order_N: np.ndarray) -> None:
    """The rows are slots, and their experts ascend."""
    if ((order_N < 0) | (order_N >= expert_ids_TK.size)).any():
        accuse("a row is no slot", expected=f"slots below {expert_ids_TK.size}", received=shown(order_N.tolist()))
    experts_N = expert_ids_TK.reshape(-1)[order_N]
    for row in np.flatnonzero(np.diff(experts_N) < 0).tolist():
        accuse(
            f"row {row + 1} is of a lower expert than row {row}",
            token=order_N[row + 1] // expert_ids_TK.shape[1],
            expected="experts in ascending order",
            received=shown(experts_N.tolist()),
        )


def hold_counts(expert_ids_TK: np.ndarray, num_experts: int, counts_E: np.ndarray) -> None:
    """The counts are the reference's."""
    wanted_E = permute(expert_ids_TK, num_experts).tokens_per_expert_E
    for expert in np.flatnonzero(counts_E != wanted_E).tolist():
        accuse(
            f"expert {expert} has {wanted_E[expert]} rows, not {counts_E[expert]}",
            expected=shown(wanted_E.tolist()),
            received=shown(counts_E.tolist()),
        )


def hold_permutation(judge: Judge, case: LayerCase, expert_ids_TK: np.ndarray, num_experts: int) -> None:
    """Rows, their order and the counts are right."""
    order_N, counts_E = permutation_of_subject(judge, case, expert_ids_TK, num_experts)
    hold_rows(expert_ids_TK, num_experts, order_N)
    hold_sorted(expert_ids_TK, order_N)
    hold_counts(expert_ids_TK, num_experts, counts_E)


def shown(value: object) -> str:
    return shortened(str(value), MOST_CHARACTERS)


@requires("PRM-1", method="permute")
def permute_runs_and_returns_integers(judge, case):
    permutation_of_subject(judge, case, any_ids(case), case.spec.router.num_experts)


@requires("PRM-2", method="permute", after=("PRM-1",))
def every_slot_of_an_expert_is_a_row_once(judge, case):
    ids_TK, E = any_ids(case), case.spec.router.num_experts
    order_N, _ = permutation_of_subject(judge, case, ids_TK, E)
    hold_rows(ids_TK, E, order_N)


@requires("PRM-3", method="permute", after=("PRM-1", "PRM-2"))
def rows_are_sorted_by_expert(judge, case):
    ids_TK = any_ids(case)
    order_N, _ = permutation_of_subject(judge, case, ids_TK, case.spec.router.num_experts)
    hold_sorted(ids_TK, order_N)


@requires("PRM-4", method="permute", after=("PRM-1",))
def counts_are_exact(judge, case):
    ids_TK, E = any_ids(case), case.spec.router.num_experts
    # Other ids in between: a buffer that is not cleared keeps their counts.
    other_ids_TK = any_ids(case.with_(seed=case.seed + 1))
    for each_TK in (ids_TK, other_ids_TK, ids_TK):
        _, counts_E = permutation_of_subject(judge, case, each_TK, E)
        hold_counts(each_TK, E, counts_E)


@requires("PRM-5", method="permute", after=("PRM-1", "PRM-2", "PRM-3"))
def rows_of_an_expert_are_in_token_order(judge, case):
    ids_TK, E = any_ids(case), case.spec.router.num_experts
    order_N, _ = permutation_of_subject(judge, case, ids_TK, E)
    wanted_N = permute(ids_TK, E).order_N
    if len(order_N) == len(wanted_N) and (order_N != wanted_N).any():
        row = int(np.flatnonzero(order_N != wanted_N)[0])
        accuse(f"row {row} is slot {order_N[row]}", expected=shown(wanted_N.tolist()), received=shown(order_N.tolist()))


@requires("PRM-6", method="permute", after=("PRM-1", "PRM-2", "PRM-3", "PRM-4"))
def an_unused_slot_is_no_row(judge, case):
    for share in (0.4, 1.0):
        hold_permutation(judge, case, ids_with_unused(case, share), case.spec.router.num_experts)


@requires("PRM-7", method="permute", after=("PRM-1", "PRM-2", "PRM-3", "PRM-4"), tokens=(7,))
def many_experts_and_many_rows_are_sorted_and_counted(judge, case):
    rng, K = case.rng(), case.spec.router.top_k
    spread_TK = np.argsort(rng.random((7, MANY_EXPERTS)), axis=-1)[:, :K]
    few = case.spec.router.num_experts
    crowded_TK = np.tile(rng.permutation(few)[: min(K, few)], (MANY_TOKENS, 1))
    for ids_TK, E in ((spread_TK, MANY_EXPERTS), (crowded_TK, few)):
        hold_permutation(judge, case, ids_TK, E)


@requires("PRM-8", method="permute", tokens=(0,))
def zero_tokens_are_no_rows(judge, case):
    ids_TK, E = np.zeros((0, case.spec.router.top_k), dtype=np.int64), case.spec.router.num_experts
    order_N, counts_E = permutation_of_subject(judge, case, ids_TK, E)
    hold_rows(ids_TK, E, order_N)
    hold_counts(ids_TK, E, counts_E)


@requires("PRM-9", method="permute", after=("PRM-1", "PRM-2", "PRM-3", "PRM-4", "PRM-6", "PRM-7"), tokens=(1,))
def slots_past_16_bits_are_sorted_and_counted(judge, case):
    T, K, E = PAST_16_BITS
    rng = case.rng()
    # The first expert is at any place, and the others follow it: distinct, and cheap to draw.
    ids_TK = (rng.integers(0, E, (T, 1)) + np.arange(K) * int(rng.integers(1, E // K))) % E
    hold_permutation(judge, case, np.where(rng.random((T, 1)) < 0.01, UNUSED, ids_TK), E)


def aligned(judge: Judge, case: LayerCase) -> Iterator[tuple[AlignSpec, np.ndarray, np.ndarray, np.ndarray]]:
    """(spec, ids, slots of the rows, multiples) of what a subject aligns: some multiples, few rows and many."""
    E, rng = case.spec.router.num_experts, case.rng()
    choices = [ids_with_unused(case, share) for share in (0.0, 0.4, 1.0)]
    for ids_TK in choices[: 1 if judge.subject.compiles else None]:
        for align in rng.permutation(np.array(ALIGNS[:2] if judge.subject.compiles else ALIGNS, dtype=object))[:2]:
            yield align, ids_TK, *aligned_of_subject(judge, case, ids_TK, E, align)


@requires("PRM-10", method="align", tokens=(7, 61, 0), few=True)
def aligned_counts_are_multiples(judge, case):
    for align, ids_TK, _, found_E in aligned(judge, case):
        rows = permute(ids_TK, case.spec.router.num_experts)
        wanted_E = align_rows(rows, align).rows_per_expert_E
        for expert in np.flatnonzero(found_E != wanted_E).tolist():
            title = f"expert {expert}, of {rows.tokens_per_expert_E[expert]} rows, has {found_E[expert]} aligned ones"
            accuse(
                f"{title} with {spec_fields(align)}",
                expected=shown(wanted_E.tolist()),
                received=shown(found_E.tolist()),
            )


@requires("PRM-11", method="align", tokens=(7, 61, 0), after=("PRM-10",), few=True)
def every_slot_is_one_aligned_row_of_its_expert(judge, case):
    for align, ids_TK, slot_of_row_A, aligned_E in aligned(judge, case):
        hold_rows(ids_TK, case.spec.router.num_experts, slot_of_row_A[slot_of_row_A != UNUSED])
        owner_A = np.repeat(np.arange(len(aligned_E)), aligned_E)
        expert_A = np.append(ids_TK.reshape(-1), UNUSED)[slot_of_row_A]
        wrong_A = (expert_A[: len(owner_A)] != owner_A) & (slot_of_row_A[: len(owner_A)] != UNUSED)
        wrong_A = np.append(wrong_A, slot_of_row_A[len(owner_A) :] != UNUSED)
        for row in np.flatnonzero(wrong_A)[:1].tolist():
            owner = f"expert {owner_A[row]}" if row < len(owner_A) else "no expert"
            title = f"aligned row {row}, of {owner}, is a slot of expert {expert_A[row]} with {spec_fields(align)}"
            accuse(title, expected=shown(aligned_E.tolist()), received=shown(slot_of_row_A.tolist()))


@requires("PRM-12", method="align", tokens=(7, 61), after=("PRM-10", "PRM-11"), few=True)
def slots_come_first_among_aligned_rows(judge, case):
    for align, ids_TK, slot_of_row_A, _ in aligned(judge, case):
        wanted_A = align_rows(permute(ids_TK, case.spec.router.num_experts), align).slot_of_row_A
        for row in np.flatnonzero(slot_of_row_A[: len(wanted_A)] != wanted_A)[:1].tolist():
            title = f"aligned row {row} is slot {slot_of_row_A[row]} with {spec_fields(align)}"
            accuse(title, expected=shown(wanted_A.tolist()), received=shown(slot_of_row_A.tolist()))
