"""moe_ref, the spec of quantile balancing: expert_bias as a quantile of what each expert needed, as data."""

from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ref.specs.base import SpecWithForms
from moe_ref.specs.checks import integer, number, one_of, require
from moe_ref.specs.router import RouterSpec

QUANTILE_FORMS: dict[str, dict[str, Any]] = {
    # The exact quantile of the whole step: section 2.3.3 of the Kimi-K3 report, after kexue.fm/archives/11619.
    "exact": {},
    # Appendix D of the report: read from histograms, as in pytorch/torchtitan#4577 and NVIDIA/Megatron-LM#6637.
    "kimi_k3": {"bins": 1000},
    # qb_dual_update and _update_router_qb_beta of megatron-core 0.19 (NVIDIA/Megatron-LM#5349): its beta is
    # -expert_bias, and its router ranks logits (select_by 'logit'); its moe_router_quantile_balancing_ema is `keep`.
    "megatron": {"over": "batches"},
    # kexue.fm/archives/11626, of selector 'threshold': its beta is threshold - expert_bias, its lambda `keep`.
    "dynamic": {"centred": False, "keep": 0.9},
}
"""Fields by which each published form differs from the defaults."""


@dataclass(frozen=True, kw_only=True)
class QuantileSpec(SpecWithForms):
    """How expert_bias is set after a step, so that each expert would have won its share of the step's tokens.

    What expert e needs to win token t is cutoff_t - ranked_te: ranked_te is the score (or logit) without bias, and
    cutoff_t the (K + 1)-th largest of ranked_t + expert_bias. With a bias of the quantile K / E of what it needs, the
    expert wins T * K / E of T tokens. The old bias enters through the cutoffs alone. Of a router of selector threshold
    the cutoff is the threshold, and K is target_top_k.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    FORMS: ClassVar = QUANTILE_FORMS
    bins: int | None = None
    """None: the (floor(T * K / E) + 1)-th smallest need. A number: read from counts of the needs in so many equal bins
    over [min(expert_bias) - 1, max(expert_bias) + 1], at the place where they reach T * K / E, as if the needs of a bin
    were spread evenly in it: less than a bin from the needs between which an exact quantile lies."""
    over: str = "pool"
    """pool: of the tokens of all ranks and micro-batches of the step; batches: the mean of the quantiles of each, which
    is another number (Megatron)."""
    centred: bool = True
    """The mean over experts is subtracted, last of all; no choice depends on it."""
    target_top_k: int | None = None
    """How many experts a token is to have in the mean, of a router of selector threshold; None: its top_k."""
    keep: float = 0.0
    """The share of the bias before that stays: keep * before + (1 - keep) * quantile."""

    def __post_init__(self):
        super().__post_init__()
        if self.bins is not None:
            integer("bins", self.bins, 1)
        if self.target_top_k is not None:
            integer("target_top_k", self.target_top_k, 1)
        one_of("over", self.over, ("pool", "batches"))
        require(isinstance(self.centred, bool), f"centred is {self.centred!r}; it is a bool")
        number("keep", self.keep, low=0.0)
        require(self.keep < 1, f"keep is {self.keep!r}; it is less than 1, with which no bias moves")
        require(
            self.bins is None or self.over == "pool",
            f"bins is {self.bins} with over {self.over!r}; the counts of bins are pooled",
        )

    def check(self, router: RouterSpec) -> None:
        """The router is one whose bias this sets.

        Raises:
            ValueError: it names the field of the router, and why.
        """
        require(
            router.takes_bias,
            f"selector is {router.selector!r}; a quantile is of a ranking: 'top_k', or of a 'threshold'",
        )
        require(
            router.num_expert_groups is None,
            f"num_expert_groups is {router.num_expert_groups}; quantile balancing knows no groups",
        )
        require(
            router.num_null_experts == 0,
            f"num_null_experts is {router.num_null_experts}; quantile balancing gives every choice the same share",
        )
        if router.selector == "threshold":
            require(self.target_top_k is not None, "target_top_k is None; with selector 'threshold' it is a number")
            integer("target_top_k", self.target_top_k, 1, router.num_experts - 1, why="num_experts - 1")
            require(not self.centred, "centred is True; against a threshold the mean of the biases counts: it is False")
            require(self.bins is None, f"bins is {self.bins} with selector 'threshold'; the quantile is exact: None")
            return
        require(
            self.target_top_k is None,
            f"target_top_k is {self.target_top_k}, but selector is 'top_k', under which all tokens have top_k",
        )
        require(
            router.top_k < router.num_experts,
            f"top_k is {router.top_k} of {router.num_experts} experts; the cutoff is the next one, so that it is less",
        )
        bounded = router.select_by == "score" and router.score_func in ("softmax", "sigmoid")
        require(
            self.bins is None or bounded,
            f"bins is {self.bins}, but what is ranked (score_func {router.score_func!r}, select_by "
            f"{router.select_by!r}) is not between 0 and 1",
        )

    def wins(self, router: RouterSpec) -> int:
        """K: of how many experts in the mean a token is to be won."""
        return router.top_k if self.target_top_k is None else self.target_top_k
