"""moe_ref, agreement: how far two recorded routings of the same tokens agree, whatever the order of the slots.

Reinforcement learning samples with one implementation and trains with another; the same router in another dtype, or
after an update, chooses other experts for some tokens. This says for how many, and how much weight moves.

Legend: T tokens, K top_k, E choices.
"""

from dataclasses import dataclass

import numpy as np

from moe_ref.specs.checks import number, require
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.record import RoutingRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingAgreement:
    """What two records have in common, by token, and in one number each.

    A token counts where some record gives it an expert: not where it is padding, or unused in both.
    """

    counted_T: np.ndarray
    """(T,) bools, the tokens that count."""
    overlap_T: np.ndarray
    """(T,) integers, the experts that a token has in both records."""
    size_T: np.ndarray
    """(T,) integers, the experts that it has in the record that gives it more."""
    moved_weight_T: np.ndarray | None
    """(T,) half the sum of the differences of the weights of all experts, as a part of the token's weight in the record
    that has more: 0 where nothing differs, 1 where both have the same weight on other experts; None without weights."""
    weights_differ_T: np.ndarray | None
    """(T,) bools, tokens of which a weight differs by more than the tolerance; None where a record has no weights."""

    @property
    def num_tokens(self) -> int:
        """The tokens that count."""
        return int(self.counted_T.sum())

    @property
    def sets_differ_T(self) -> np.ndarray:
        """(T,) bools, tokens with another set of experts."""
        return self.overlap_T < self.size_T

    @property
    def mean_overlap(self) -> float:
        """Experts that a token has in both records, of top_k at most; NaN where no token counts."""
        return self._mean(self.overlap_T)

    @property
    def overlap_rate(self) -> float:
        """The share of all chosen experts that both records have; NaN where no token counts."""
        return float(self.overlap_T.sum() / self.size_T.sum()) if self.num_tokens else float("nan")

    @property
    def set_mismatch_rate(self) -> float:
        """The share of tokens with another set of experts; NaN where no token counts."""
        return self._mean(self.sets_differ_T)

    @property
    def weight_mismatch_rate(self) -> float | None:
        """The share of tokens of which a weight differs, other experts included; None without weights."""
        return None if self.weights_differ_T is None else self._mean(self.weights_differ_T)

    @property
    def mean_moved_weight(self) -> float | None:
        """The mean of moved_weight_T; None without weights."""
        return None if self.moved_weight_T is None else self._mean(self.moved_weight_T)

    def _mean(self, values_T: np.ndarray) -> float:
        return float(values_T[self.counted_T].mean()) if self.num_tokens else float("nan")


def agreement(one: RoutingRecord, other: RoutingRecord, *, tolerance: float = 1e-3) -> RoutingAgreement:
    """How far two records of the same tokens agree; slots may stand in any order, and top_k may differ.

    Padding and unused slots have no expert. A weight of an expert that the other record does not choose is 0 there.

    Args:
        tolerance: the part of the larger of two weights by which they may differ.

    Raises:
        ValueError: the records are of another number of tokens or choices, or another padding.
    """
    number("tolerance", tolerance, low=0.0)
    T, others = len(one.expert_ids_TK), len(other.expert_ids_TK)
    require(others == T, f"other has {others} tokens; one has {T}")
    E, choices = one.spec.num_choices, other.spec.num_choices
    require(choices == E, f"num_choices of other is {choices}; that of one is {E}")
    differing = np.flatnonzero(one.token_mask_T != other.token_mask_T)
    require(len(differing) == 0, f"token_mask_T differs in {len(differing)} tokens, the first being {differing[:1]}")
    in_one_TE, in_other_TE = (_chosen(record) for record in (one, other))
    size_T = np.maximum(in_one_TE.sum(axis=-1), in_other_TE.sum(axis=-1))
    moved_T = differ_T = None
    if one.weights_TK is not None and other.weights_TK is not None:
        one_TE, other_TE = _weights(one, one.weights_TK), _weights(other, other.weights_TK)
        apart_TE, largest_TE = np.abs(one_TE - other_TE), np.maximum(np.abs(one_TE), np.abs(other_TE))
        total_T = np.maximum(np.abs(one_TE).sum(axis=-1), np.abs(other_TE).sum(axis=-1))
        moved_T = apart_TE.sum(axis=-1) / 2 / np.where(total_T == 0, 1, total_T)
        differ_T = ((apart_TE > tolerance * largest_TE) | (in_one_TE != in_other_TE)).any(axis=-1)
    return RoutingAgreement(
        counted_T=size_T > 0,
        overlap_T=(in_one_TE & in_other_TE).sum(axis=-1),
        size_T=size_T,
        moved_weight_T=moved_T,
        weights_differ_T=differ_T,
    )


def _chosen(record: RoutingRecord) -> np.ndarray:
    """(T, E) bools, which experts a token has."""
    found_TE = np.zeros((len(record.expert_ids_TK), record.spec.num_choices), dtype=bool)
    tokens, slots = np.nonzero(record.expert_ids_TK != UNUSED)
    found_TE[tokens, record.expert_ids_TK[tokens, slots]] = True
    return found_TE


def _weights(record: RoutingRecord, weights_TK: np.ndarray) -> np.ndarray:
    """(T, E) the weight of each choice; 0 where it is not chosen."""
    found_TE = np.zeros((len(weights_TK), record.spec.num_choices))
    tokens, slots = np.nonzero(record.expert_ids_TK != UNUSED)
    found_TE[tokens, record.expert_ids_TK[tokens, slots]] = weights_TK[tokens, slots]
    return found_TE
