"""conformance, balance: the picture of a failure. The load of each expert, and what the subject makes of it.

Legend: T tokens, K top_k, E experts.
"""

import numpy as np

from conformance.balance.bounds import wanted_loss, wanted_z_loss
from conformance.balance.case import BalanceCase
from conformance.balance.verdicts import (
    bias_of_subject,
    counts_of_subject,
    kept_by_subject,
    loss_of_subject,
    z_loss_of_subject,
)
from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.picture import MOST_COLUMNS, Bars, Panel, asked, bars
from moe_ref import bias_update, tokens_per_expert


def picture(judge: Judge | None, violation: Violation, case: BalanceCase) -> list[Panel]:
    """The load of each expert, and the result of the method that is judged beside that of the reference.

    Args:
        judge: None where the subject is not called again.
    """
    if case.spec.num_experts > MOST_COLUMNS:
        return []
    method = CHECKS[violation.requirement].method
    make = {"load": _load, "bias_update": _bias, "capacity": _capacity, "balance_loss": _loss, "z_loss": _z_loss}
    return make[method](judge, case, violation.token) if method in make else []


def _by_expert(title: str, wanted_E: np.ndarray, found_E: np.ndarray | None, note: str = "") -> Bars:
    found_E = None if found_E is None else np.asarray(found_E, dtype=np.float64)
    return bars(title, list(map(str, range(len(wanted_E)))), np.asarray(wanted_E, np.float64), found_E, note=note)


def _counts(case: BalanceCase, ids_TK: np.ndarray) -> np.ndarray:
    return tokens_per_expert(ids_TK, case.spec.num_experts, case.inputs.get("token_mask_T"))


def _load(judge: Judge | None, case: BalanceCase, token: int | None) -> list[Panel]:
    counts_E = _counts(case, case.expert_ids_TK)
    return [_by_expert("Load of each expert", counts_E, asked(judge, counts_of_subject, case))]


def _bias(judge: Judge | None, case: BalanceCase, token: int | None) -> list[Panel]:
    counts_E = case.counts_SE.sum(axis=0)
    wanted_E = bias_update(counts_E, case.rule("update"), case.expert_bias_E)
    return [
        _by_expert("Load of each expert, over all ranks", counts_E, None),
        _by_expert("Bias before the update", case.expert_bias_E, None),
        _by_expert("Bias after the update", wanted_E, asked(judge, bias_of_subject, case)),
    ]


def _capacity(judge: Judge | None, case: BalanceCase, token: int | None) -> list[Panel]:
    kept = asked(judge, kept_by_subject, case)
    trace = case.capacity_trace
    rooms = ", ".join(map(str, trace.capacity_U.tolist()))
    found_E = None if kept is None else _counts(case, kept.expert_ids_TK)
    return [
        _by_expert(
            "Slots that chose each expert", _counts(case, case.expert_ids_TK), None, f"Room in a unit: {rooms}."
        ),
        _by_expert("Slots that each expert keeps", _counts(case, trace.expert_ids_TK), found_E),
    ]


def _loss(judge: Judge | None, case: BalanceCase, token: int | None) -> list[Panel]:
    wanted, found, trace = wanted_loss(case), asked(judge, loss_of_subject, case), case.balance_trace
    panels: list[Panel] = [
        _by_expert(f"Load of each expert, unit {unit}", counts_E, None)
        for unit, counts_E in enumerate(trace.counts_UE[:4, : case.spec.num_choices])
    ]
    pair = None if found is None else np.reshape(found.loss, 1)
    panels.append(bars("Loss", ["loss"], np.reshape(wanted.loss, 1), pair))
    return [*panels, *_gradient(case, token, wanted.d_logits_TE, None if found is None else found.d_logits_TE)]


def _z_loss(judge: Judge | None, case: BalanceCase, token: int | None) -> list[Panel]:
    wanted, found = wanted_z_loss(case), asked(judge, z_loss_of_subject, case)
    pair = None if found is None else np.reshape(found.loss, 1)
    panels: list[Panel] = [bars("Loss", ["loss"], np.reshape(wanted.loss, 1), pair)]
    return [*panels, *_gradient(case, token, wanted.d_logits_TE, None if found is None else found.d_logits_TE)]


def _gradient(case: BalanceCase, token: int | None, wanted_TE: np.ndarray, found_TE: np.ndarray | None) -> list[Panel]:
    """The gradient by the logits of one token."""
    if not case.num_tokens or wanted_TE.shape[1] > MOST_COLUMNS:
        return []
    t = token or 0
    return [_by_expert(f"Token {t}: gradient by its logits", wanted_TE[t], None if found_TE is None else found_TE[t])]
