"""conformance, router: the picture of a failure. A token's scores in their groups, what is chosen, and its weights.

Legend: E experts, K top_k, G groups, L groups kept, C columns shown.
"""

import numpy as np

from conformance.core.judge import Judge
from conformance.core.picture import MOST_COLUMNS, Bars, Panel, asked, bars, differing
from conformance.router.case import RouterCase
from conformance.router.observation import Observation, observe
from moe_ref import UNUSED


def picture(judge: Judge | None, case: RouterCase, token: int | None) -> list[Panel]:
    """The choice scores of the token, and its weights; without a token, of the first one that differs.

    Args:
        judge: None where the subject is not called again.
    """
    if not case.num_tokens or not case.is_routable:
        return []
    seen = asked(judge, observe, case)
    t = _first_that_differs(case, seen) if token is None else token
    return [*_scores(case, seen, t), *_weights(case, seen, t)]


def _first_that_differs(case: RouterCase, seen: Observation | None) -> int:
    """The first token with other experts, then with other weights; else the first one."""
    if seen is None:
        return 0
    own = case.reference
    other_sets_T = (np.sort(own.expert_ids_TK) != np.sort(seen.expert_ids_TK)).any(axis=-1)
    slots_T = [differing(own.weights_TK, seen.weights_TK).any(axis=-1), np.ones(case.num_tokens, dtype=bool)]
    return int(np.flatnonzero(next(each for each in (other_sets_T, *slots_T) if each.any()))[0])


def _scores(case: RouterCase, seen: Observation | None, t: int) -> list[Bars]:
    """What the token's experts are ranked by, groups not yet dropped; nothing where nothing is ranked."""
    spec, own = case.spec, case.reference
    groups = spec.num_expert_groups is not None
    try:
        ranked = case.with_(spec=spec.without_groups()).reference if groups else own
    except ValueError:  # the router is none without its groups
        ranked = own
    choice_TE = ranked.scores_for_choice_TE if ranked.scores_for_choice_TE is not None else own.scores_TE
    if choice_TE is None:
        choice_TE = case.logits_TE[:, : spec.num_choices]
    choice_E = choice_TE[t]
    chosen, found = own.expert_ids_TK[t], None if seen is None else seen.expert_ids_TK[t]
    columns_C = _columns(choice_E, chosen, found)
    place_of = {int(e): place for place, e in enumerate(columns_C)}
    kept, kept_found, of_columns = (), None, ()
    if groups and own.group_ids_TL is not None:
        kept = tuple(own.group_ids_TL[t].tolist())
        of_columns = tuple((columns_C // spec.experts_per_group).tolist())
        kept_found = None if seen is None or seen.group_ids_TL is None else tuple(seen.group_ids_TL[t].tolist())
    left_out = len(choice_E) - len(columns_C)
    note = f"{left_out} experts with lower scores are not shown." if left_out else ""
    return [
        Bars(
            title=f"Token {t}: what its experts are ranked by" + (", groups not yet dropped" if of_columns else ""),
            note=note,
            columns=tuple(map(str, columns_C.tolist())),
            wanted=tuple(choice_E[columns_C].tolist()),
            groups=of_columns,
            kept=kept,
            kept_found=kept_found,
            chosen=_places(place_of, chosen),
            chosen_found=None if found is None else _places(place_of, found),
            choosing=True,
        )
    ]


def _columns(choice_E: np.ndarray, *chosen: np.ndarray | None) -> np.ndarray:
    """Every expert; of very many the chosen ones and those with the best scores."""
    if len(choice_E) <= MOST_COLUMNS:
        return np.arange(len(choice_E))
    named = [ids[ids != UNUSED].tolist() for ids in chosen if ids is not None]
    first = list(dict.fromkeys(e for ids in named for e in ids))
    best = [e for e in np.argsort(-choice_E, kind="stable").tolist() if e not in set(first)]
    return np.sort(np.array([*first, *best][: max(MOST_COLUMNS, len(first))]))


def _places(place_of: dict[int, int], ids: np.ndarray) -> tuple[int, ...]:
    return tuple(place_of[e] for e in ids.tolist() if e in place_of)


def _weights(case: RouterCase, seen: Observation | None, t: int) -> list[Bars]:
    """The weight of each expert that one of the two chooses, in the reference's slot order."""
    own = case.reference
    wanted = _by_expert(own.expert_ids_TK[t], own.weights_TK[t])
    found = {} if seen is None else _by_expert(seen.expert_ids_TK[t], seen.weights_TK[t])
    experts = list(dict.fromkeys([*wanted, *found]))
    if not experts:  # a padding token has none
        return []
    rows = [np.array([each.get(e, 0.0) for e in experts]) for each in (wanted, found)]
    return [bars(f"Token {t}: weights", list(map(str, experts)), rows[0], None if seen is None else rows[1])]


def _by_expert(ids_K: np.ndarray, weights_K: np.ndarray) -> dict[int, float]:
    pairs = zip(ids_K.tolist(), weights_K.tolist(), strict=True)
    return {e: weight for e, weight in pairs if e != UNUSED}
