"""conformance, identify: reading. What the columns of the logits are, and what the choice reads.

Legend: T tokens, C columns, K top_k.
"""

import numpy as np

from conformance.identify.asking import Asking
from conformance.identify.box import Question
from conformance.identify.choice import other_ids_T
from conformance.identify.rounding import narrow_of, rounds_logits
from moe_ref.rounding import NARROW


def columns(asking: Asking) -> tuple[int, int, int, str]:
    """(experts, null experts, shared experts that the router scores, kind of the null experts)."""
    told, C = asking.box.handed, asking.box.columns
    high_CC = asking.logits(-1.0, 1.0, C) + 4 * np.eye(C)
    first = asking.ask(high_CC, plain=True)
    assert first is not None, "the box was opened with such logits"
    num_shared = 0 if first.shared_weights_TS is None else first.shared_weights_TS.shape[1]
    extra = C - told.num_experts - num_shared
    by_logit = len(first.expert_ids_TK) == C
    zero_C = np.zeros(C, bool)
    if by_logit:
        for e in range(C - num_shared):
            own = first.expert_ids_TK[e] == e
            zero_C[e] = bool((first.weights_TK[e][own] == 0).any())
    if extra == 1 and by_logit and not zero_C[-1 - num_shared]:
        t = told.num_experts
        missing = t not in first.expert_ids_TK[t] and (first.weights_TK[t] == 0).any()
        if missing:
            asking.hidden_null = zero_C[t] = True
            asking.notes.append(f"a skipped choice is returned as expert 0 of weight 0, not as choice {t} (SEL-11)")
            asking.questions = [asking.with_null_ids(first)]
    skipped = 0
    while skipped < C - num_shared - 1 and zero_C[C - num_shared - 1 - skipped]:
        skipped += 1
    if skipped:
        return C - num_shared - skipped, skipped, num_shared, "skip"
    return C - num_shared - extra, extra, num_shared, "identity"


def selector(asking: Asking, first: Question, num_choices: int) -> str:
    """What the choice reads: logits (top_k, which stands for all that rank them), a table, given ids, a turn, nothing.

    Args:
        first: an answer for as many tokens as are asked here.
    """
    box = asking.box
    if box.top_k == num_choices:
        return box.form if box.form else "top_k"
    again = box.ask(asking.logits(0.0, 2.0, len(first.logits_TC)), seed=1)
    same = box.ask(asking.logits(0.0, 2.0, len(first.logits_TC)), seed=1)
    if other_ids_T(again.expert_ids_TK, same.expert_ids_TK).any():
        return "top_k"
    if box.form:
        return box.form
    T, K = same.expert_ids_TK.shape
    in_turn_TK = (np.arange(T * K) % box.handed.num_experts).reshape(T, K)
    return "random" if other_ids_T(in_turn_TK, same.expert_ids_TK).any() else "round_robin"


def reads_batch(asking: Asking, first: Question) -> bool:
    """Whether the first tokens of a batch have other experts without the rest."""
    some = asking.ask(first.logits_TC[:3], plain=True)
    if some is None or len(some.expert_ids_TK) != 3:
        return False
    return bool(other_ids_T(some.expert_ids_TK, first.expert_ids_TK[:3]).any())


def constant_weights(questions: list[Question]) -> bool:
    """Whether the weights of a token are alike though its logits are not."""
    weights_TK = np.concatenate([question.weights_TK for question in questions])
    return bool(np.median(np.ptp(weights_TK, axis=-1) / np.maximum(weights_TK.max(axis=-1), 1e-30)) < 1e-3)


def router_dtype(asking: Asking, questions: list[Question], *, ranks_some: bool) -> str:
    """The narrow dtype that logits, scores and weights are rounded to, or float32; a note where some are not.

    Args:
        questions: those whose weights are looked at.
        ranks_some: whether the choice ranks logits and leaves some out.
    """
    box, dtype = asking.box, narrow_of(questions)
    # Logits that are given in the dtype show no rounding of their own.
    shows = ranks_some and dtype != box.dtype
    if dtype in NARROW and shows and not rounds_logits(asking.aside, dtype, box.columns, box.top_k):
        asking.notes.append(f"its weights are rounded to {dtype}, and its logits are not: no router_dtype does that")
        return "float32"
    return dtype
