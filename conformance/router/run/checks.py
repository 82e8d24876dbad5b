"""conformance, router: what holds for every run, whatever the spec."""

import numpy as np

from conformance.core.judge import Crash, Violation, accuse
from conformance.router.kind import requires
from conformance.router.observation import Observation, observe, routed
from conformance.router.predicates import ALL_KINDS, by_token
from conformance.router.verdicts import differ
from moe_ref import UNUSED


@requires("RUN-1", logits=ALL_KINDS)
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
        found = np.shape(getattr(routing, name))
        if found != shape:
            accuse(f"{name} of zero tokens", expected=str(shape), received=str(found))


@requires("RUN-3", tokens=(7,), spec=by_token, logits=("separated", "normal", "large", "negative", "huge"))
def a_token_is_routed_by_itself(judge, case):
    rows = case.rng().permutation(case.num_tokens)[: case.num_tokens - 2]
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
    for name in ("expert_ids_TK", "weights_TK"):
        a, b = getattr(first, name), getattr(second, name)
        for t in np.flatnonzero(~((a == b) | (np.isnan(a) & np.isnan(b))).all(axis=-1)):
            accuse(
                f"{name} differs between two equal calls",
                token=int(t),
                expected=str(a[t].tolist()),
                received=str(b[t].tolist()),
            )


@requires("RUN-5", tokens=(7,), spec=by_token, logits=("separated",))
def a_nan_stays_in_its_token(judge, case):
    rng = case.rng()
    row, columns = int(rng.integers(case.num_tokens)), rng.random(case.spec.num_logits) < rng.choice([0.2, 1.0])
    poisoned = case.logits_TE.copy()
    poisoned[row, columns] = np.nan
    seen = observe(judge, case)
    try:
        spoiled = observe(judge, case.with_(logits_TE=poisoned))
    except Violation as violation:
        if isinstance(violation, Crash) and violation.refused:
            return
        raise Violation(
            f"with NaN in token {row}: {violation.title}",
            token=violation.token,
            expected=violation.expected,
            received=violation.received,
        ) from None
    others = np.arange(case.num_tokens) != row
    for t in np.flatnonzero(others):
        if pairs(seen, t) != pairs(spoiled, t):
            accuse(
                f"a NaN in token {row} changes token {t}",
                token=int(t),
                expected=pairs(seen, t),
                received=pairs(spoiled, t),
            )


@requires("RUN-6", tokens=(7,), inputs=("token_mask_T",), spec=lambda spec: spec.selector != "random")
def padding_is_routed_nowhere(judge, case):
    valid_T = case.inputs["token_mask_T"]
    poisoned = np.where(valid_T[:, None], case.logits_TE, np.nan)
    unmasked = observe(judge, case.with_(inputs={k: v for k, v in case.inputs.items() if k != "token_mask_T"}))
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


def pairs(seen, token) -> str:
    """A token's experts with their weights, by id."""
    ids_K, weights_K = seen.expert_ids_TK[token], seen.weights_TK[token]
    return "  ".join(f"{ids_K[k]}:{weights_K[k]:.7g}" for k in np.argsort(ids_K, kind="stable"))
