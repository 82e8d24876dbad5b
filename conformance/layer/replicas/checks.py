"""conformance, layer: replicas. One expert at several places.

Legend: T tokens, K top_k, E experts, P places.
"""

import numpy as np

from conformance.core.case import float32
from conformance.core.holding import hold
from conformance.core.judge import Judge, accuse
from conformance.core.rounding import EPSILON
from conformance.core.show import shortened
from conformance.layer.case import LayerCase
from conformance.layer.kind import requires
from conformance.layer.verdicts import array_of
from moe_ref import UNUSED, ReplicaSpec, home, place_slots
from moe_ref.specs.replicas import CHOICES

MOST = 4
"""Replicas of an expert."""
MOST_CHARACTERS = 200
UNUSED_SHARE = 0.3


def any_replicas(case: LayerCase, choice: str) -> ReplicaSpec:
    """Some experts at several places, in any order."""
    rng, E = case.rng(), case.spec.router.num_experts
    times_E = np.where(rng.random(E) < 0.5, 1, rng.integers(1, MOST + 1, E))
    placement = rng.permutation(np.repeat(np.arange(E), times_E))
    return ReplicaSpec(num_experts=E, placement=tuple(placement.tolist()), choice=choice)


def any_ids(case: LayerCase) -> np.ndarray:
    """Distinct choices for each token, some slots unused."""
    rng, router = case.rng(), case.spec.router
    ids_TK = np.argsort(rng.random((case.num_tokens, router.num_choices)), axis=-1)[:, : router.top_k]
    return np.where(rng.random(ids_TK.shape) < UNUSED_SHARE, UNUSED, ids_TK)


def places_of_subject(judge: Judge, case: LayerCase, ids_TK: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
    """The subject's (T, K) places, as int64."""
    found = array_of(judge.call(case, "place_slots", ids_TK.copy(), replicas), ids_TK.shape, "places")
    return found.astype(np.int64)


def accuse_slot(title: str, wrong_TK: np.ndarray, wanted: object, found: object) -> None:
    """The first slot that is wrong."""
    for token in np.flatnonzero(wrong_TK.any(axis=-1))[:1].tolist():
        shown = (shortened(str(value), MOST_CHARACTERS) for value in (wanted, found))
        accuse(title, token=token, **dict(zip(("expected", "received"), shown, strict=True)))


@requires("REP-1", method="place_slots", few=True, tokens=(7, 0))
def a_slot_goes_to_a_place_of_its_expert(judge, case):
    for choice in CHOICES:
        replicas, ids_TK = any_replicas(case, choice), any_ids(case)
        found_TK, E = places_of_subject(judge, case, ids_TK, replicas), replicas.num_experts
        placement_P = np.array(replicas.placement)
        is_place_TK = (found_TK >= 0) & (found_TK < replicas.num_places)
        expert_TK = np.where(is_place_TK, placement_P[np.clip(found_TK, 0, replicas.num_places - 1)], found_TK)
        wanted_TK = np.where(ids_TK >= E, ids_TK - E + replicas.num_places, ids_TK)
        wrong_TK = (expert_TK != wanted_TK) | (is_place_TK != ((ids_TK >= 0) & (ids_TK < E)))
        title = f"not at a place of its expert, with experts {placement_P.tolist()} at the places"
        accuse_slot(title, wrong_TK, ids_TK.tolist(), expert_TK.tolist())


@requires("REP-2", method="place_slots", few=True, tokens=(7, 17), after=("REP-1",))
def replicas_are_dealt_out_as_the_choice_says(judge, case):
    for choice in CHOICES:
        replicas, ids_TK = any_replicas(case, choice), any_ids(case)
        found_TK, wanted_TK = places_of_subject(judge, case, ids_TK, replicas), place_slots(ids_TK, replicas)
        accuse_slot(
            f"another replica than {choice!r} has", found_TK != wanted_TK, wanted_TK.tolist(), found_TK.tolist()
        )


@requires("REP-3", method="home", few=True, tokens=(7,), bias=("none",))
def counts_come_home(judge, case):
    replicas = any_replicas(case, CHOICES[0])
    counts_P = case.rng().integers(0, 2**20, replicas.num_places)
    found_E = array_of(judge.call(case, "home", counts_P.copy(), replicas), (replicas.num_experts,), "counts")
    hold("not the count of its places", found_E, home(counts_P, replicas), label=lambda e: f"expert {e}")


@requires("REP-4", method="home", few=True, tokens=(7,), bias=("none",), after=("REP-3",))
def gradients_come_home(judge, case):
    replicas, dtype = any_replicas(case, CHOICES[0]), judge.subject.compute_dtype
    values_PD = float32(case.rng().normal(size=(replicas.num_places, 3)))
    found_ED = array_of(
        judge.call(case, "home", values_PD.astype(np.float32), replicas), (replicas.num_experts, 3), "gradients"
    )
    radius_ED = MOST * EPSILON[dtype] * home(np.abs(values_PD), replicas)
    hold("not the sum over its places", found_ED, home(values_PD, replicas), radius_ED, label=lambda e: f"expert {e}")
