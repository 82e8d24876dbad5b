"""conformance, router: what holds for every run, whatever the spec."""

import numpy as np

from conformance.core.judge import Crash, Judge, Violation, accuse
from conformance.core.rounding import equal
from conformance.router.case import RouterCase
from conformance.router.draw import LOGITS
from conformance.router.kind import requires
from conformance.router.observation import RUNS, Observation, given_to, observe, routed, well_formed
from conformance.router.predicates import by_token
from conformance.router.verdicts import differ, unused
from moe_ref import UNUSED


@requires("RUN-1", logits=LOGITS)
def a_router_runs_every_case_that_it_supports(judge, case):
    routed(judge, case)


@requires("RUN-2", tokens=(0,))
def zero_tokens_give_empty_results(judge, case):
    shape = (0, case.spec.top_k)
    try:
        routing = routed(judge, case)
    except Crash as crash:
        raise Violation(crash.title, expected=shape, received=crash.received) from None
    for name in ("expert_ids_TK", "weights_TK"):
        value = getattr(routing, name)
        found = np.shape(value)
        if found != shape and not (isinstance(value, list) and not value):  # a list of no rows has no second axis
            accuse(f"{name} of zero tokens", expected=str(shape), received=str(found))


FEW = (7,)
"""Tokens from which some are taken away; of a subject that compiles, from these alone."""


def elsewhere(judge: Judge, case: RouterCase, *, fewer: bool = True) -> np.ndarray:
    """Rows of a case in another order, and without two of them where that costs no compilation."""
    order_T = case.rng().permutation(case.num_tokens)
    return order_T[: case.num_tokens - 2] if fewer or not judge.subject.compiles else order_T


@requires(
    "RUN-3", few=True, tokens=FEW, spec=by_token, logits=("separated", "close", "normal", "large", "negative", "huge")
)
def a_token_is_routed_by_itself(judge, case):
    rows = elsewhere(judge, case, fewer=case.num_tokens in FEW)
    seen, alone = observe(judge, case), observe(judge, case.tokens(rows))
    picked = Observation(case=alone.case, expert_ids_TK=seen.expert_ids_TK[rows], weights_TK=seen.weights_TK[rows])
    for t in differ(judge, picked, alone):
        accuse(
            "a token is routed otherwise in another batch",
            token=int(rows[t]),
            expected=pairs(picked, t),
            received=pairs(alone, t),
        )


@requires("RUN-4", logits=("normal", "tied", "equal"))
def the_same_input_gives_the_same_output(judge, case):
    first, second = observe(judge, case), observe(judge, case.with_())
    hold_the_same(first, second, "differs between two equal calls")


def hold_the_same(first: Observation, second: Observation, what: str) -> None:
    """Two results have the same bits."""
    for name in ("expert_ids_TK", "weights_TK"):
        one_TK, other_TK = getattr(first, name), getattr(second, name)
        for t in np.flatnonzero(~equal(one_TK, other_TK).all(axis=-1)):
            accuse(f"{name} {what}", token=int(t), expected=one_TK[t].tolist(), received=other_TK[t].tolist())


def hold_spoiled(judge: Judge, case: RouterCase, spoiled_T: np.ndarray, what: str) -> None:
    """Tokens that cannot be routed are refused, or leave the others as they are and every id distinct and in range."""
    clean = case.with_logits(np.where(spoiled_T[:, None], 0.0, case.logits_TE))
    seen = observe(judge, clean)
    row = int(spoiled_T.argmax())
    try:
        spoiled = observe(judge, case)
    except Violation as violation:
        if isinstance(violation, Crash) and violation.refused:
            return
        raise Violation(
            f"with {what} in token {row}: {violation.title}",
            token=violation.token,
            expected=violation.expected,
            received=violation.received,
        ) from None
    for t in np.flatnonzero(~spoiled_T):
        if pairs(seen, t) != pairs(spoiled, t):
            accuse(
                f"{what} in token {row} changes token {t}",
                token=int(t),
                expected=pairs(seen, t),
                received=pairs(spoiled, t),
            )


@requires("RUN-5", tokens=FEW, spec=by_token, logits=("nan", "nan_row"))
def a_nan_stays_in_its_token(judge, case):
    hold_spoiled(judge, case, np.isnan(case.logits_TE).any(axis=-1), "NaN")


@requires("RUN-9", tokens=FEW, spec=by_token, logits=("infinite_row",))
def a_row_of_minus_infinity_stays_in_its_token(judge, case):
    infinite_T = np.isneginf(case.logits_TE).all(axis=-1)
    hold_spoiled(judge, case, infinite_T, "nothing but -inf")
    try:
        seen = observe(judge, case)
    except Crash:  # refused
        return
    for t in np.flatnonzero(infinite_T & (unused(seen.expert_ids_TK) & (seen.weights_TK != 0)).any(axis=-1)):
        accuse("a slot of nobody has a weight", token=int(t), expected="0 where the id is -1", received=pairs(seen, t))


@requires("RUN-6", tokens=(7,), inputs=("token_mask_T",), spec=lambda s: s.selector != "random" and not s.reads_batch)
def padding_is_routed_nowhere(judge, case):
    valid_T = case.inputs["token_mask_T"]
    poisoned = np.where(valid_T[:, None], case.logits_TE, np.nan)
    unmasked = observe(judge, case.with_inputs(token_mask_T=None))
    try:
        seen = observe(judge, case.with_(logits_TE=poisoned))
    except Violation as violation:  # sound without padding, as the line before has seen
        raise Violation(
            f"with padding: {violation.title}",
            token=violation.token,
            expected=violation.expected,
            received=violation.received,
        ) from None
    for t in np.flatnonzero(~valid_T):
        if (seen.expert_ids_TK[t] != UNUSED).any() or (seen.weights_TK[t] != 0).any():
            accuse("a padding token is routed", token=int(t), expected="ids -1, weights 0", received=pairs(seen, t))
    for t in np.flatnonzero(valid_T):
        if pairs(seen, t) != pairs(unmasked, t):
            accuse("padding changes another token", token=int(t), expected=pairs(unmasked, t), received=pairs(seen, t))


@requires("RUN-7", logits=("normal", "large", "masked", "tied"))
def a_router_changes_no_array(judge, case):
    routed(judge, case, blame=RUNS)
    (logits_TE, _, bias_E), inputs = judge.handed
    given_logits_TE, given_bias_E = given_to(judge, case)
    hold_unchanged({"logits": (given_logits_TE, logits_TE), "expert_bias": (given_bias_E, bias_E)})
    hold_unchanged({name: (case.inputs[name], value) for name, value in inputs.items()})
    if "gate" in judge.capabilities:
        rng, E = case.rng(), case.spec.num_experts
        x_TD, gate_ED = (rng.normal(size=n).astype(np.float32) for n in ((case.num_tokens, 5), (E, 5)))
        judge.call(case, "gate", x_TD.copy(), gate_ED.copy(), None, blame=RUNS)
        hold_unchanged({"tokens": (x_TD, judge.handed[0][0]), "gate": (gate_ED, judge.handed[0][1])})


def hold_unchanged(arrays: dict[str, tuple]) -> None:
    """Each array holds after the call what it held before it."""
    for name, (before, after) in arrays.items():
        if before is None:
            continue
        # What is given in float32 was rounded to it before.
        before, after = (np.asarray(each).astype(np.float32) for each in (before, after))
        for place in np.argwhere(~equal(before, after))[:1]:
            accuse(
                f"{name}{place.tolist()} is another number after the call",
                expected=f"{before[tuple(place)]:.7g}",
                received=f"{after[tuple(place)]:.7g}",
            )


@requires(
    "RUN-8",
    few=True,
    tokens=FEW,
    spec=by_token,
    logits=("tied", "equal", "one_hot", "separated", "close", "saturated"),
    after=("RUN-3",),
)
def the_same_token_gets_the_same_experts(judge, case):
    T = case.num_tokens
    rows_of_batches = [elsewhere(judge, case, fewer=not judge.subject.compiles)]
    rows_of_batches.append(np.repeat(case.rng().permutation(T), 2)[:T])  # each token twice, side by side
    ids_TK = np.sort(observe(judge, case).expert_ids_TK, axis=-1)
    for rows in rows_of_batches:
        other_TK = np.sort(observe(judge, case.tokens(rows)).expert_ids_TK, axis=-1)
        for place in np.flatnonzero((other_TK != ids_TK[rows]).any(axis=-1))[:1]:
            accuse(
                f"token {rows[place]} has other experts as token {place} of another batch",
                token=int(rows[place]),
                expected=str(ids_TK[rows[place]].tolist()),
                received=str(other_TK[place].tolist()),
            )


@requires("RUN-10", logits=("normal",), after=("RUN-4",))
def what_a_router_returned_stays(judge, case):
    returned = routed(judge, case, blame=RUNS)
    first = well_formed(case, returned)
    routed(judge, case.with_(logits_TE=-case.logits_TE), blame=RUNS)
    hold_the_same(first, well_formed(case, returned), "is another after the next call")


def pairs(seen, token) -> str:
    """A token's experts with their weights, by id."""
    ids_K, weights_K = seen.expert_ids_TK[token], seen.weights_TK[token]
    return "  ".join(f"{ids_K[k]}:{weights_K[k]:.7g}" for k in np.argsort(ids_K, kind="stable"))
