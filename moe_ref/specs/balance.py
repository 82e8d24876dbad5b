"""moe_ref, the specs of load: balance losses, the bias update, and capacity, as data.

A published loss is a name (`BALANCE_FORMS`) for values of the fields of `BalanceSpec`; the fields alone say what it is.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any, ClassVar, Self

from moe_ref.specs.base import Spec, SpecWithForms
from moe_ref.specs.checks import integer, number, one_axis, one_of, require
from moe_ref.specs.router import RouterSpec
from moe_ref.specs.router_rules import SCORE_FUNCS

BALANCE_FORMS: dict[str, dict[str, Any]] = {
    # arXiv:2101.03961, equations 4 to 6; with K > 1 as in arXiv:2501.11873, so that balance is 1 for every K.
    "switch": {},
    # arXiv:2006.16668, algorithm 1: the first choice alone is counted, and the mean over experts is not scaled up.
    "gshard": {"counted_slots": 1, "expert_power": -1},
    # load_balancing_loss_func of huggingface/transformers: balance is K, not 1 (huggingface/transformers#43775).
    "transformers": {"counts": "unbiased", "counts_over": "tokens", "scope": "local", "over_layers": "pooled"},
    # arXiv:2405.04434, and modeling_deepseek of its release with seq_aux.
    "deepseek_v2": {"per": "sequence"},
    # arXiv:2412.19437, equations 17 to 20.
    "sequence": {"score_func": "sigmoid", "norm_scores": True, "counts": "unbiased", "per": "sequence"},
    # mean over experts times E ** 2 is E times their sum; 0.2.5 divides by K, releases before it do not.
    "maxtext": {"per": "sequence", "counts_over": "tokens"},
    "maxtext_0_2_5": {"per": "sequence"},
    # switch_load_balancing_loss_func of NVIDIA/Megatron-LM, on the scores of compute_routing_scores_for_aux_loss.
    "megatron_aux": {"counts": "unbiased", "scope": "local"},
    "megatron_seq_aux": {"counts": "unbiased", "per": "sequence", "scope": "local"},
    # The loss that global_aux_loss is meant to be, with f a share of all slots so far (NVIDIA/Megatron-LM#7213).
    "megatron_global_aux": {"counts": "unbiased", "scope": "running"},
    # What the release computes: no share unless all micro-batches are equally long, and padding moves it.
    "megatron_global_aux_0_16": {"counts": "unbiased", "scope": "running_mean"},
    # arXiv:2412.14711, and apply_l1_reg of thu-ml/ReMoE: its L1 norm, each expert's part times f. target_top_k is its
    # moe_router_topk; its coefficient adapts (`SparsitySpec`).
    "remoe": {"score_func": "relu", "scope": "local"},
}
"""Fields by which each published loss differs from the defaults, the coefficient aside.

A router of Megatron with score function sigmoid has score_func 'sigmoid', norm_scores True and score_eps 1e-20 besides.
"""

RUNNING_SCOPES = ("running", "running_mean")
BALANCE_SCOPES = ("global", "local", *RUNNING_SCOPES)


@dataclass(frozen=True, kw_only=True)
class BalanceSpec(SpecWithForms):
    """A balance loss: coeff * E ** expert_power * sum over experts of f_e * P_e.

    f_e is the share of the counted slots, or of the tokens, that went to expert e; P_e is the mean score of e. Both are
    of one unit (the batch, or one sequence); the loss is the mean over the units that hold a valid token. Counts are
    constants: the gradient goes through P alone.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    FORMS: ClassVar = BALANCE_FORMS
    coeff: float = 1.0
    score_func: str = "softmax"
    """Of the logits, once, and never of biased scores: softmax, sigmoid, sqrtsoftplus, relu."""
    norm_scores: bool = False
    """A token's scores are divided by their sum; a softmax has that already."""
    score_eps: float = 0.0
    """Added to that sum (Megatron: 1e-20, which very negative logits can reach, NVIDIA/Megatron-LM#1545)."""
    counts: str = "routed"
    """routed: the given ids; unbiased: the top k of these scores, without bias and without groups."""
    counted_slots: int | None = None
    """Only this many first slots of a token are counted (GShard: 1); None: all K."""
    counts_over: str = "slots"
    """What f is a share of: slots (T * K, or T * counted_slots) or tokens (T)."""
    target_top_k: int | None = None
    """How many experts a token is to have in the mean, of a router under which their number varies: f is a share of
    T * target_top_k slots, so that it sums to 1 where they have it. None: of all its slots."""
    expert_power: int = 1
    """The power of E in front: 1; 0; or -1 for a plain mean over experts (GShard)."""
    per: str = "batch"
    """The unit: the batch, or each sequence."""
    scope: str = "global"
    """global: counts and scores of all shards belong to the same units; local: each shard has its own units, and the
    loss is the mean over shards; running: shards are micro-batches in order of time, f of each is the share of all
    counts so far, its own included, in all slots so far, and the loss is the mean over those with a valid token;
    running_mean, of a release and wrong: f of each is the mean count of the micro-batches so far, those of padding
    alone included, over the slots of this one, so that f sums to 1 only where all are equally long
    (NVIDIA/Megatron-LM#7213)."""
    over_layers: str = "separate"
    """separate: the losses of layers are summed; pooled: the tokens of all layers are one batch (transformers)."""

    def __post_init__(self):
        super().__post_init__()
        number("coeff", self.coeff, low=0.0)
        one_of("score_func", self.score_func, SCORE_FUNCS)
        require(isinstance(self.norm_scores, bool), f"norm_scores is {self.norm_scores!r}; it is a bool")
        require(
            not (self.norm_scores and self.score_func == "softmax"),
            "norm_scores is True with score_func 'softmax', which is a share already",
        )
        require(
            self.score_func != "relu" or not (self.norm_scores or self.counts == "unbiased"),
            "score_func is 'relu', whose scores may all be 0; then norm_scores is False, and counts is 'routed'",
        )
        number("score_eps", self.score_eps, low=0.0)
        require(
            self.norm_scores or self.score_eps == 0,
            f"score_eps is {self.score_eps!r}, but norm_scores is False",
        )
        one_of("counts", self.counts, ("routed", "unbiased"))
        if self.counted_slots is not None:
            integer("counted_slots", self.counted_slots, 1)
        one_of("counts_over", self.counts_over, ("slots", "tokens"))
        if self.target_top_k is not None:
            integer("target_top_k", self.target_top_k, 1)
            for field, only in (("counts", "routed"), ("counted_slots", None), ("counts_over", "slots")):
                value = getattr(self, field)
                require(value == only, f"{field} is {value!r}, but with target_top_k it is {only!r}")
        integer("expert_power", self.expert_power, -1, 1)
        one_of("per", self.per, ("batch", "sequence"))
        one_of("scope", self.scope, BALANCE_SCOPES)
        one_of("over_layers", self.over_layers, ("separate", "pooled"))
        require(
            self.scope not in RUNNING_SCOPES or self.per == "batch",
            f"scope is {self.scope!r} with per {self.per!r}; running counts are of batches",
        )

    @property
    def scores_sum_to_1(self) -> bool:
        """Whether a token's scores are shares of 1 (up to score_eps)."""
        return self.norm_scores or self.score_func == "softmax"


BIAS_RULES = ("sign", "proportional", "relative", "tanh", "share")
SMEBU: dict[str, Any] = {"rule": "tanh", "rate": 5e-4, "steepness": 2.0, "momentum": 0.5, "centred": True}
"""Soft-clamped momentum expert bias updates of Arcee Trinity Large (arXiv:2602.17004), as it was trained."""


@dataclass(frozen=True, kw_only=True)
class BiasUpdateSpec(Spec):
    """How expert_bias moves after a step by the counts of it, without a loss (arXiv:2408.15664).

    Raises:
        ValueError: a field is out of its range.
    """

    rate: float = 0.001
    rule: str = "sign"
    """With excess = mean count - count. sign: rate * sign(excess); proportional: rate * excess; relative: rate *
    excess / mean count, which does not grow with the batch; tanh: rate * tanh(steepness * excess / mean count); share:
    rate * (wanted_share / experts that move - count / all counts), those of frozen experts included (LongCat-Flash,
    arXiv:2509.01322, whose null experts are frozen)."""
    wanted_share: float = 1.0
    """What the experts that move are to get together of all slots; only with rule 'share' (LongCat: the experts with
    an FFN that a token is to have, over top_k)."""
    steepness: float = 1.0
    """Of the tanh; only with that rule."""
    centred: bool = False
    """The mean of the step is subtracted from it, so that the biases keep their sum (torchtitan)."""
    frozen_E: tuple[bool, ...] | None = None
    """Experts whose bias stays. They are left out of both means: the others balance among themselves."""
    momentum: float = 0.0
    """What a bias moves by is momentum * its last move + (1 - momentum) * the step of the rule, centred or not."""

    def __post_init__(self):
        super().__post_init__()
        number("rate", self.rate, low=0.0)
        one_of("rule", self.rule, BIAS_RULES)
        number("steepness", self.steepness, above=0.0)
        require(
            self.steepness == 1 or self.rule == "tanh",
            f"steepness is {self.steepness!r}, but rule is {self.rule!r}",
        )
        number("wanted_share", self.wanted_share, above=0.0)
        require(
            self.wanted_share == 1 or (self.rule == "share" and self.wanted_share < 1),
            f"wanted_share is {self.wanted_share!r}, but rule is {self.rule!r}"
            if self.rule != "share"
            else f"wanted_share is {self.wanted_share!r}; it is at most 1, all slots",
        )
        number("momentum", self.momentum, low=0.0)
        require(self.momentum < 1, f"momentum is {self.momentum!r}; it is less than 1, with which no bias moves")
        require(isinstance(self.centred, bool), f"centred is {self.centred!r}; it is a bool")
        if self.frozen_E is not None:
            object.__setattr__(self, "frozen_E", one_axis("frozen_E", self.frozen_E))  # JSON has lists
            bools = all(isinstance(frozen, bool) for frozen in self.frozen_E)
            require(bools, f"frozen_E is {self.frozen_E!r}; its entries are bools")
            require(not all(self.frozen_E), "frozen_E freezes every expert; at least one moves")


CAPACITY_SCOPES = ("global", "rank", "sequence")
ROUNDINGS = ("ceil", "floor", "ceil_then_floor")
DROP_ORDERS = ("first_come", "slot_major", "by_weight", "by_best_weight")


@dataclass(frozen=True, kw_only=True)
class CapacitySpec(Spec):
    """How many slots an expert takes, and which are dropped beyond.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    factor: float | None = None
    """Times the slots that an expert would have in balance, T * K / E. It is the decimal number that is written: 1.1
    is 11 / 10, so that no rounding of floats moves a capacity."""
    slots: int | None = None
    """The capacity itself, in place of a factor (transformers' Switch)."""
    scope: str = "global"
    """Where a capacity holds: the whole batch, each rank (shard), or each sequence."""
    rounding: str = "ceil"
    """With factor f. ceil: ceil(f * T * K / E) (Megatron); floor: floor(f * T * K / E) (Switch); ceil_then_floor:
    floor(f * ceil(T * K / E)) (MaxText)."""
    min_slots: int = 0
    """The capacity is at least this (Megatron's and DeepSpeed's min_capacity)."""
    drop_order: str = "first_come"
    """Who is kept. first_come: tokens in order, each with all its slots (MaxText; Megatron's drop policy 'position');
    slot_major: all first slots, then all second ones (GShard, Switch); by_weight: the largest weights, ties in
    first-come order (Megatron's 'probs'); by_best_weight: slot_major with the tokens in the order of their largest
    weight, ties in order (batch prioritised routing: V-MoE, arXiv:2106.05974; nllb_moe)."""
    renormalise: str = "no"
    """Whether a token's weights are divided by their sum: no; before the drop, dropped ones included; or after it."""
    weight_sum: float = 1.0
    """What renormalised weights sum to; a router with a route_scale has that."""
    pad_to_capacity: bool = False
    """Every expert has as many rows as its capacity, the unused ones empty: the trace has a table of them."""
    then: "CapacitySpec | None" = None
    """A second limit on what this one keeps (ranks, then the whole batch); balance is still of all T * K slots."""

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.factor is None) != (self.slots is None),
            f"factor is {self.factor!r} and slots is {self.slots!r}; one of them is given",
        )
        if self.factor is not None:
            number("factor", self.factor, above=0.0)
        if self.slots is not None:
            integer("slots", self.slots, 0)
            require(self.rounding == "ceil", f"rounding is {self.rounding!r}, but factor is None")
        one_of("scope", self.scope, CAPACITY_SCOPES)
        one_of("rounding", self.rounding, ROUNDINGS)
        integer("min_slots", self.min_slots, 0)
        one_of("drop_order", self.drop_order, DROP_ORDERS)
        one_of("renormalise", self.renormalise, ("no", "before", "after"))
        number("weight_sum", self.weight_sum, above=0.0)
        require(
            self.weight_sum == 1.0 or self.renormalise != "no",
            f"weight_sum is {self.weight_sum!r}, but renormalise is 'no'",
        )
        require(isinstance(self.pad_to_capacity, bool), f"pad_to_capacity is {self.pad_to_capacity!r}; it is a bool")
        require(
            self.then is None or (isinstance(self.then, CapacitySpec) and self.then.then is None),
            f"then is {self.then!r}; it is a CapacitySpec without another, or None",
        )

    @property
    def factor_ratio(self) -> tuple[int, int]:
        """The factor as numerator and denominator, for exact capacities in whole numbers."""
        return Fraction(str(float(self.factor or 0))).as_integer_ratio()

    def capacity(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Slots of one expert in a unit of that many valid tokens; never more than the tokens. [CAP-3, CAP-4]"""
        if self.slots is not None:
            wanted = self.slots
        elif self.rounding == "ceil_then_floor":
            balanced = ceil(Fraction(num_tokens * top_k, num_experts))
            wanted = floor(Fraction(*self.factor_ratio) * balanced)
        else:
            exact = Fraction(*self.factor_ratio) * Fraction(num_tokens * top_k, num_experts)
            wanted = ceil(exact) if self.rounding == "ceil" else floor(exact)
        # A token has an expert at most once (deepspeedai/DeepSpeed#8155).
        return min(max(wanted, self.min_slots), num_tokens)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """A spec from the names of its fields; `then` is a dict of the same kind."""
        values = dict(values)
        if isinstance(values.get("then"), dict):
            values["then"] = cls.from_dict(values["then"])
        return super().from_dict(values)

    def to_dict(self) -> dict:
        """The fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        found = super().to_dict()
        return found if self.then is None else found | {"then": self.then.to_dict()}


def check_capacity(router: RouterSpec, capacity: CapacitySpec | None) -> None:
    """A capacity is of experts that are chosen; those that choose take as many tokens as they say.

    Raises:
        ValueError: there is one, and the selector is expert_choice.
    """
    require(
        capacity is None or router.selector != "expert_choice",
        f"capacity is {capacity}, but selector is 'expert_choice', whose experts take take_factor * tokens / "
        "num_experts each; it is None",
    )
