"""conformance, balance: load. Quantile balancing: the bias that gives each expert its share of a step's tokens."""

from functools import partial
from typing import Any

import numpy as np

from conformance.balance.bounds import quantile_radius
from conformance.balance.case import BalanceCase
from conformance.balance.kind import requires
from conformance.balance.verdicts import quantile_of_subject, wanted_quantile
from conformance.core.judge import Judge, accuse
from conformance.core.show import shown

TOKENS = (12, 10, 40, 1)
"""10 tokens of which 2 in 5 are a whole number."""
quantiles: Any = partial(requires, method="quantile_update", routers=True, tokens=TOKENS)


def hold_quantile(judge: Judge, case: BalanceCase, title: str) -> None:
    """The bias is the reference's."""
    wanted_E, found_E = wanted_quantile(case), quantile_of_subject(judge, case)
    if not (np.abs(found_E - wanted_E) <= quantile_radius(judge, case, wanted_E)).all():
        before = f"{title}; before {shown(case.expert_bias_E)}"
        accuse(before, expected=shown(wanted_E), received=shown(found_E))


def ranks(spec) -> bool:
    """An exact quantile, of a router whose tokens all have top_k experts."""
    return spec.quantile.bins is None and spec.router.selector == "top_k"


def valid_alone(case: BalanceCase) -> BalanceCase:
    """The case of the valid tokens, without a mask."""
    return case.tokens(np.flatnonzero(case.valid_T)).with_inputs(token_mask_T=None)


def uncut(case: BalanceCase) -> BalanceCase:
    """The same tokens as one batch."""
    return case.with_inputs(tokens_per_shard=None)


@quantiles("LOD-40", spec=lambda s: ranks(s) and not s.quantile.keep, logits=("normal", "large"))
def the_bias_is_what_wins_a_share(judge, case):
    hold_quantile(judge, case, "not the quantile")


@quantiles("LOD-41", spec=lambda s: s.quantile.keep > 0, after=("LOD-44", "LOD-50"))
def a_share_of_the_bias_stays(judge, case):
    hold_quantile(judge, case, "not the mixture")


@quantiles("LOD-44", spec=lambda s: s.quantile.bins is not None and not s.quantile.keep, logits=("normal", "large"))
def a_quantile_is_read_from_bins(judge, case):
    hold_quantile(judge, case, "not the place in the bins")


ONE_BATCH = ("LOD-40", "LOD-41", "LOD-44")


@quantiles("LOD-42", inputs=("tokens_per_shard",), simpler=((uncut, ONE_BATCH),))
def tokens_are_pooled_before_the_quantile(judge, case):
    hold_quantile(judge, case, f"on shards of {case.inputs.get('tokens_per_shard')} tokens")


@quantiles("LOD-43", inputs=("token_mask_T",), masks=("some",), simpler=((valid_alone, ONE_BATCH),))
def padding_is_in_no_quantile(judge, case):
    hold_quantile(judge, case, "with padding")


@quantiles("LOD-45", inputs=("token_mask_T",), masks=("all",))
def without_a_token_no_bias_moves(judge, case):
    found_E = quantile_of_subject(judge, case)
    if not np.array_equal(found_E, case.expert_bias_E):
        accuse("moved without a token", expected=shown(case.expert_bias_E), received=shown(found_E))
