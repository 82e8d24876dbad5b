"""moe_ref, the spec of a router: how tokens choose experts, and with which weights.

A spec says *what* a router computes, never how. Each field past the first few defaults to the identity, so a spec
lists only what a model has. What a field can be, and what goes with what, is in `router_rules.py`; families with their
published sizes are in `families.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from moe_ref.specs import names, router_rules
from moe_ref.specs.base import Spec, first_difference
from moe_ref.specs.checks import one_of, require
from moe_ref.specs.readers import hf
from moe_ref.specs.router_rules import VARYING, WITHOUT_GROUPS, WITHOUT_TAKING


@dataclass(frozen=True, kw_only=True)
class RouterSpec(Spec):
    """How tokens choose experts and with which weights, at evaluation.

    Sources: node-limited routing and expert_bias from DeepSeek-V3 (arXiv:2412.19437); names after
    pytorch/torchtitan; the remaining fields from 75 model families of huggingface/transformers 5.24.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    ALIASES: ClassVar = names.ALIASES

    num_experts: int
    """Routed experts, E. The logits have one column for each of them, and those named below."""
    top_k: int
    """Experts per token, K."""
    router_dtype: str = "float32"
    """What logits, scores and weights are held in. float32: no rounding is described, and a router has float32's
    accuracy; float64: gate and router have that of float64 (Megatron's moe_router_dtype fp64); bfloat16 or float16, to
    describe routers that do that: logits, scaled logits, scores and final weights are each rounded to it, once, and
    computed in float32 at least. A bias, its sum with the scores, and the sums of groups are not rounded."""

    # score
    score_func: str = "softmax"
    """softmax, sigmoid, sqrtsoftplus, sqrt(log(1 + exp(z))), or relu, max(z, 0) (ReMoE, arXiv:2412.14711, with selector
    'threshold' and a top_k of all experts)."""
    score_over: str = "all"
    """all: scored before the selection; selected: softmax over the selected logits alone (gpt-oss)."""
    logit_scale: float = 1.0
    """Multiplies the logits before all else (muse_spark)."""
    logit_softcap: float | None = None
    """c in c * tanh(z / c), after logit_scale (laguna); None: no cap."""

    # limit_groups
    num_expert_groups: int | None = None
    """Groups of consecutive experts, G; None: no groups."""
    num_limited_groups: int | None = None
    """Groups kept for each token, L."""
    group_score_k: int = 2
    """A group's score is the sum of its k best choice scores: 2 DeepSeek-V3, 1 DeepSeek-V2."""
    mask_fill: float = -np.inf
    """Choice score of an expert of a dropped group: -inf, or 0 to describe models that do that."""

    # select
    selector: str = "top_k"
    """top_k; group_top_k (Pangu Pro); table (by token id), given (replay), round_robin, random (load tests),
    sparsemixer (phimoe); sinkhorn, of training (Megatron): logits evened over the whole batch, so that a token's
    experts depend on the others; expert_choice (arXiv:2202.09368): each expert takes the tokens of the batch that score
    best for it, so that a token has any number of experts, 0 and all included. top_k is then num_experts: a token has a
    slot for each expert that may take it, and those that did not leave theirs unused. threshold and top_p: as many
    experts as the token needs, at most top_k."""
    threshold: float = 0.0
    """What a choice score is to be above; only with selector threshold. With 0 and score_func relu that is ReMoE
    (thu-ml/ReMoE, ReLURouter); with 0 and an expert_bias of -beta, the dynamic quantile balancing of
    kexue.fm/archives/11626, which selects where score - beta > 0."""
    top_p: float | None = None
    """p: a token takes its best choices in turn while the scores of those before sum to at most p, so that the last one
    takes the sum above p; only with selector top_p (arXiv:2403.07652, as ZhenweiAn/Dynamic_MoE computes it)."""
    quota_groups: int | None = None
    """Groups of consecutive experts, of which each gives its top_k / quota_groups best choices; only with selector
    group_top_k, the mixture of grouped experts of arXiv:2505.21411 (xtuner, lmdeploy: router_n_groups). Scores and
    weights are those of all experts."""
    take_factor: float = 1.0
    """With selector expert_choice each expert takes num_tokens * take_factor / num_experts tokens: how many experts a
    token has in the mean (the paper's capacity factor c). It is the decimal number that is written, as a capacity's."""
    take_rounding: str = "ceil"
    """How that number is rounded: ceil; floor (google-deepmind/simply#8); or round, to the nearest, halves to even
    (ExpertsChooseMaskedRouter of flaxformer)."""
    take_least: int = 0
    """Each expert takes at least so many (flaxformer's min_expert_capacity: 4), but never more than there are."""
    select_by: str = "score"
    """What is ranked and what expert_bias is added to: score or logit."""
    mixer_eps: float = 0.01
    """Half the relative width of sparsemixer's band; only with that selector."""

    # weigh
    weights_from: str = "scores"
    """scores, or masked_scores: scores of dropped groups replaced by mask_fill (DeepSeek-V2)."""
    route_norm: bool = False
    """Weights of a token are divided by their norm."""
    norm_form: str = "add_eps"
    """add_eps: w / (norm + norm_eps); clamp: w / max(norm, norm_eps)."""
    norm_eps: float = 0.0
    norm_p: float = 1.0
    """Order of the norm (dbrx: any)."""
    norm_with_shared: bool = False
    """The scores of router-scored shared experts join the norm (inkling)."""
    route_scale: float = 1.0
    """Multiplies the weights, once, after the norm."""
    learned_scale: str = "none"
    """none, per_expert (gemma4: by expert id), global (inkling): trained factors on the weights."""

    # what the layer does with ids and weights
    num_null_experts: int = 0
    """Choices without an FFN, Z; their columns follow the E experts. Ids E .. E+Z-1."""
    null_kind: str = "identity"
    """identity: the expert returns its input (longcat_flash); skip: its weight is 0 (zaya)."""
    num_constant_experts: int = 0
    """Of the null experts the first so many return a1 * x + a2 * v, with (a1, a2) = softmax(W x), where v and W are
    learned (MoE++, arXiv:2410.07348, SkyworkAI/MoE-plus-plus)."""
    num_zero_experts: int = 0
    """Of the null experts the last so many return 0, and weigh 0 before the norm, which so leaves them out (MoE++)."""
    num_scored_shared_experts: int = 0
    """Always active experts, scored by the router; their columns come last (inkling)."""
    weight_on: str = "output"
    """The weight multiplies the expert's output, or its input (llama4)."""
    output_scale: float = 1.0
    """Multiplies the summed routed output, before shared experts are added."""

    def __post_init__(self):
        super().__post_init__()
        router_rules.check(self)

    @property
    def num_choices(self) -> int:
        """What a token can choose from: experts and null experts."""
        return self.num_experts + self.num_null_experts

    @property
    def identity_ids(self) -> range:
        """The null experts that return their input, by id."""
        last = self.num_choices - self.num_zero_experts
        return range(self.num_experts + self.num_constant_experts, last if self.null_kind == "identity" else 0)

    @property
    def num_logits(self) -> int:
        """Columns of the logits: choices, then router-scored shared experts."""
        return self.num_choices + self.num_scored_shared_experts

    @property
    def experts_per_group(self) -> int:
        """P. Expert i belongs to group i // P."""
        return self.num_experts // (self.num_expert_groups or 1)

    @property
    def scales_logits(self) -> bool:
        """Whether `scale_logits` changes anything: what is scored is not the logits as they came."""
        return self.logit_scale != 1 or self.logit_softcap is not None

    @property
    def rounds(self) -> bool:
        """Whether logits, scores and weights are rounded to a dtype narrower than float32."""
        return self.router_dtype in ("bfloat16", "float16")

    @property
    def has_scores(self) -> bool:
        """Whether there is a score for every choice before the selection."""
        return self.score_over == "all" and self.selector != "sparsemixer"

    @property
    def ranks(self) -> bool:
        """Whether choice scores decide, best first: scores or logits, with what the selector does to them."""
        return self.selector in ("top_k", "group_top_k", "sinkhorn", "expert_choice", *VARYING)

    @property
    def takes_bias(self) -> bool:
        """Whether an expert_bias is added to what is ranked."""
        return self.selector in ("top_k", "threshold")

    @property
    def varies(self) -> bool:
        """Whether the number of a token's experts depends on its logits."""
        return self.selector in VARYING

    @property
    def reads_batch(self) -> bool:
        """Whether the experts of a token depend on the other tokens: cut otherwise, a batch may choose others.

        Over ranks each one takes its own tokens for the batch.
        """
        return self.selector in ("sinkhorn", "expert_choice")

    @property
    def fills_slots(self) -> bool:
        """Whether a token that is no padding has an expert in each of its slots."""
        return self.selector not in ("given", "expert_choice", *VARYING)

    @cached_property
    def share_taken(self) -> tuple[int, int]:
        """take_factor / num_experts of selector expert_choice, as two whole numbers."""
        factor = Fraction(str(float(self.take_factor)))
        return factor.numerator, factor.denominator * self.num_experts

    def takes(self, num_tokens: Any) -> Any:
        """C: how many of so many tokens, padding left out, each expert takes with selector expert_choice. [SEL-31]

        Args:
            num_tokens: an int, or an array of int64 of any framework; so is what is returned.
        """
        over, under = self.share_taken
        wanted = num_tokens * over // under
        rest = num_tokens * over - wanted * under
        # In operators that integers and arrays have alike; without a comparison, which no number of tokens that an
        # exported program leaves open would pass.
        if self.take_rounding == "ceil":
            wanted = wanted + (rest + under - 1) // under
        elif self.take_rounding == "round":
            above, from_half = (2 * rest + under - 1) // (2 * under), (2 * rest + under) // (2 * under)
            wanted = wanted + above + (from_half - above) * (wanted % 2)
        if self.take_least:
            wanted = wanted + (wanted < self.take_least) * (self.take_least - wanted)
        if self.take_least or over > under:
            # A token is taken once.
            wanted = wanted - (wanted > num_tokens) * (wanted - num_tokens)
        return wanted

    def at_evaluation(self) -> Self:
        """The same router without what is of training alone: sinkhorn gives way to the best logits."""
        return self.replace(selector="top_k") if self.selector == "sinkhorn" else self

    def without_groups(self) -> Self:
        """The same router, which looks at all experts."""
        return self.replace(**WITHOUT_GROUPS)

    def given(self, *, with_weights: bool = False) -> Self:
        """The same router with its choice replaced by a given one: no selection, no groups. [RPL-4]

        The scores of a group count as they are, dropped by this router or not. A balancing bias takes part in a choice
        alone: there is none beside this spec.

        Args:
            with_weights: whether the weights are given too.

        Raises:
            ValueError: its weights are not a function of the chosen ids alone (sparsemixer), and are not given.
        """
        require(
            with_weights or self.selector != "sparsemixer",
            "selector is 'sparsemixer', whose weights depend on how it chose; replay it with recorded weights",
        )
        return self.replace(
            selector="given", quota_groups=None, threshold=0.0, top_p=None, **WITHOUT_TAKING, **WITHOUT_GROUPS
        )

    @classmethod
    def from_hf(cls, config: Any, *, ignore: Iterable[str] = ()) -> Self:
        """The router of a config of huggingface: of all its MoE layers, which are the same. See `LayerSpec.from_hf`.

        It also reads model types whose layer no LayerSpec describes.
        """
        reading = hf.read(config, ignore=ignore)
        first = _router(cls, reading, reading.sparse[0])
        for layer in reading.sparse:
            other = _router(cls, reading, layer)
            require(
                other == first,
                f"the routers of layers {reading.sparse[0]} and {layer} differ ({first_difference(first, other)}); "
                "LayerSpec.layers_from_hf(config) has one for each decoder layer",
            )
        return first

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """A spec from names of this or another framework (`names.ALIASES`); an unknown name is a ValueError.

        A dict with a `model_type` is a published config (`from_hf`). Of the others' names, a null says nothing, 0
        groups are none, and topk_method says how groups are scored.
        """
        if "model_type" in values:
            return cls.from_hf(values)
        values = dict(values)
        if values.get("mask_fill") == "-inf":  # JSON has no infinity
            values["mask_fill"] = -np.inf
        for name in (*names.GROUPS, *names.LIMITED_GROUPS):
            if values.get(name) == 0 and name in names.ALIASES:
                values[name] = None
        for name in ("router_dtype", "moe_router_dtype"):
            if values.get(name) is not None:
                values[name] = names.dtype_named(values[name])
        method = values.pop("topk_method", None)
        if method is not None:
            one_of("topk_method", method, names.METHODS)
            values = names.METHODS[method] | values
        found = super().from_dict(values)
        groups = found.num_expert_groups or 1
        require(
            (method != "greedy" or groups == 1) and (method != "group_limited_greedy" or groups > 1),
            f"topk_method is {method!r}, but there are {groups} groups of experts",
        )
        return found


def _router(cls, reading: hf.Reading, layer: int):
    """The router of one layer of a config; an error speaks of the user's keys."""
    fields = reading.router(layer)
    try:
        return cls(**fields)
    except ValueError as error:
        raise ValueError(f"{reading.config.renamed(str(error))}, in {reading.config.what}") from error
