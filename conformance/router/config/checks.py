"""conformance, router: what no router may accept."""

from conformance.core.judge import Crash, Judge, accuse
from conformance.router.case import RouterCase
from conformance.router.kind import requires

GROUPED = {
    "num_experts": 16,
    "top_k": 4,
    "score_func": "sigmoid",
    "num_expert_groups": 4,
    "num_limited_groups": 2,
    "route_norm": True,
    "norm_eps": 1e-20,
}


def is_refused(judge: Judge, case: RouterCase, why: str, **fields) -> None:
    """configure() raises for these fields, and not in an assert, though it takes the valid ones beside them."""
    judge.call(case, "configure", dict(GROUPED))
    try:
        judge.call(case, "configure", GROUPED | fields)
    except Crash as crash:
        if isinstance(crash.__cause__, AssertionError):  # python -O removes it
            accuse(why, expected=f"ValueError for {fields}", received=crash.received)
        return  # refused, if not always in good words
    accuse(why, expected=f"ValueError for {fields}", received="accepted")


@requires("CFG-1", method="configure", tokens=(1,), shows_case=False)
def a_top_k_that_the_kept_groups_cannot_fill_is_refused(judge, case):
    is_refused(judge, case, "2 groups of 4 experts cannot fill 12 slots", top_k=12)


@requires("CFG-2", method="configure", tokens=(1,), shows_case=False)
def impossible_groups_are_refused(judge, case):
    is_refused(judge, case, "3 groups do not divide 16 experts", num_expert_groups=3)
    is_refused(judge, case, "5 groups cannot be kept of 4", num_limited_groups=5)
    is_refused(judge, case, "groups of 1 have no two best scores", num_expert_groups=16, num_limited_groups=8)


@requires("CFG-3", method="configure", tokens=(1,), shows_case=False)
def an_unknown_score_function_is_refused(judge, case):
    is_refused(judge, case, "there is no score function 'sigmax'", score_func="sigmax")


@requires("CFG-4", method="configure", tokens=(1,), shows_case=False)
def a_top_k_larger_than_the_number_of_experts_is_refused(judge, case):
    is_refused(
        judge, case, "17 experts cannot be selected of 16", top_k=17, num_expert_groups=None, num_limited_groups=None
    )
