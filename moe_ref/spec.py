"""moe_ref, the specs: frozen, validated descriptions of what a Mixture-of-Experts layer computes.

A spec says *what* a layer computes, never how. Each field past the first few defaults to the identity,
so a spec lists only what a model has. Families with their published sizes are in `families.py`.
"""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Self

import numpy as np

from moe_ref.checks import integer, nearest, number, one_of, require
from moe_ref.names import ALIASES

SCORE_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
SELECTORS = ("top_k", "table", "given", "round_robin", "random", "sparsemixer")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How tokens choose experts and with which weights, at evaluation.

    Sources: node-limited routing and expert_bias from DeepSeek-V3 (arXiv:2412.19437); names after
    pytorch/torchtitan; the remaining fields from 72 model families of huggingface/transformers 5.23.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    num_experts: int
    """Routed experts, E. The logits have one column for each of them, and those named below."""
    top_k: int
    """Experts per token, K."""

    # score
    score_func: str = "softmax"
    """softmax, sigmoid or sqrtsoftplus, sqrt(log(1 + exp(z)))."""
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
    """top_k; table (by token id), given (replay), round_robin, random (load tests), sparsemixer (phimoe)."""
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
    num_scored_shared_experts: int = 0
    """Always active experts, scored by the router; their columns come last (inkling)."""
    weight_on: str = "output"
    """The weight multiplies the expert's output, or its input (llama4)."""
    output_scale: float = 1.0
    """Multiplies the summed routed output, before shared experts are added."""

    def __post_init__(self):
        integer("num_experts", self.num_experts, 1)
        integer("num_null_experts", self.num_null_experts, 0)
        integer("num_scored_shared_experts", self.num_scored_shared_experts, 0)
        one_of("score_func", self.score_func, SCORE_FUNCS)
        one_of("score_over", self.score_over, ("all", "selected"))
        one_of("select_by", self.select_by, ("score", "logit"))
        one_of("selector", self.selector, SELECTORS)
        one_of("weights_from", self.weights_from, ("scores", "masked_scores"))
        one_of("norm_form", self.norm_form, ("add_eps", "clamp"))
        one_of("learned_scale", self.learned_scale, ("none", "per_expert", "global"))
        one_of("null_kind", self.null_kind, ("identity", "skip"))
        one_of("weight_on", self.weight_on, ("output", "input"))
        for field in ("route_norm", "norm_with_shared"):
            require(isinstance(getattr(self, field), bool), f"{field} is {getattr(self, field)!r}; it is a bool")
        for field in ("logit_scale", "norm_p", "mixer_eps"):
            number(field, getattr(self, field), above=0.0)
        for field in ("norm_eps", "route_scale", "output_scale"):
            number(field, getattr(self, field), low=0.0)
        if self.logit_softcap is not None:
            number("logit_softcap", self.logit_softcap, above=0.0)
        require(
            self.mask_fill in (0.0, -np.inf),
            f"mask_fill is {self.mask_fill!r}; it is -inf, or 0.0 to describe a model that fills with 0",
        )
        integer("top_k", self.top_k, 1, self.num_choices, why="num_experts + num_null_experts")
        self._check_groups()
        self._check_combinations()

    def _check_groups(self):
        if self.num_expert_groups is None:
            for field, identity in (("num_limited_groups", None), ("group_score_k", 2),
                                    ("mask_fill", -np.inf), ("weights_from", "scores")):  # fmt: skip
                value = getattr(self, field)
                require(value == identity, f"{field} is {value!r}, but num_expert_groups is None")
            return
        integer("num_expert_groups", self.num_expert_groups, 1, self.num_experts, why="num_experts")
        require(
            self.num_experts % self.num_expert_groups == 0,
            f"num_expert_groups is {self.num_expert_groups}, which does not divide num_experts ({self.num_experts})",
        )
        require(self.num_limited_groups is not None, "num_limited_groups is None; with groups it is an integer")
        integer("num_limited_groups", self.num_limited_groups, 1, self.num_expert_groups, why="num_expert_groups")
        integer("group_score_k", self.group_score_k, 1, self.experts_per_group, why="experts per group")
        kept = (self.num_limited_groups or 0) * self.experts_per_group
        # Otherwise the selection falls through to masked experts (huggingface/transformers#48647).
        require(
            self.top_k <= kept,
            f"top_k is {self.top_k}, but the {self.num_limited_groups} kept groups of {self.experts_per_group} "
            f"experts hold {kept}",
        )
        require(self.num_null_experts == 0, f"num_null_experts is {self.num_null_experts}; with groups it is 0")
        require(
            self.selector == "top_k",
            f"selector is {self.selector!r}; with num_expert_groups it is 'top_k'",
        )

    def _check_combinations(self):
        if self.score_over == "selected":
            require(
                self.score_func == "softmax",
                f"score_over is 'selected' with score_func {self.score_func!r}; only a softmax has a support",
            )
            # Nothing is scored before the selection, so there is nothing else to rank.
            require(self.select_by == "logit", "score_over is 'selected'; then select_by is 'logit'")
        if self.selector == "sparsemixer":
            require(self.select_by == "logit", "selector is 'sparsemixer'; then select_by is 'logit'")
            require(
                self.score_func == "softmax",
                f"selector is 'sparsemixer' with score_func {self.score_func!r}; its weights are banded softmaxes",
            )
            require(self.score_over == "all", "selector is 'sparsemixer'; then score_over is 'all'")
        if self.selector == "round_robin":
            integer("top_k", self.top_k, 1, self.num_experts, why="num_experts; round_robin takes no null expert")
        if self.num_scored_shared_experts:
            require(
                self.score_func != "softmax",
                "num_scored_shared_experts needs a score_func of one logit alone, not 'softmax'",
            )
        require(
            self.num_scored_shared_experts > 0 or not self.norm_with_shared,
            "norm_with_shared is True, but num_scored_shared_experts is 0",
        )

    @property
    def num_choices(self) -> int:
        """What a token can choose from: experts and null experts."""
        return self.num_experts + self.num_null_experts

    @property
    def num_logits(self) -> int:
        """Columns of the logits: choices, then router-scored shared experts."""
        return self.num_choices + self.num_scored_shared_experts

    @property
    def experts_per_group(self) -> int:
        """P. Expert i belongs to group i // P."""
        return self.num_experts // (self.num_expert_groups or 1)

    @property
    def has_scores(self) -> bool:
        """Whether there is a score for every choice before the selection."""
        return self.score_over == "all" and self.selector != "sparsemixer"

    @classmethod
    def from_dict(cls, values: dict) -> "RouterSpec":
        """A spec from names of this or another framework (`names.ALIASES`); an unknown name is a ValueError."""
        own = {field.name for field in fields(cls)}
        found = {}
        for name, value in values.items():
            field = name if name in own else ALIASES.get(name)
            if field not in own:
                raise ValueError(f"unknown field {name!r} of RouterSpec{nearest(name, own | ALIASES.keys())}")
            if field in found:
                raise ValueError(f"field {field} is given twice (once as {name!r})")
            found[field] = -np.inf if field == "mask_fill" and value == "-inf" else value
        missing = {"num_experts", "top_k"} - found.keys()
        if missing:
            raise ValueError(f"RouterSpec needs {', '.join(sorted(missing))}")
        return cls(**found)

    def to_dict(self) -> dict:
        """The fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        default = {field.name: field.default for field in fields(self)}
        found = {name: value for name, value in asdict(self).items() if value != default[name]}
        return found

    def replace(self, **changes) -> "RouterSpec":
        """A copy with other values, validated again."""
        return replace(self, **changes)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What the specs below share: reading, writing, and a changed copy."""

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """A spec from the names of its fields; an unknown name is a ValueError."""
        own = {field.name for field in fields(cls)}
        for name in values:
            require(name in own, f"unknown field {name!r} of {cls.__name__}{nearest(name, own)}")
        missing = {field.name for field in fields(cls) if field.default is MISSING} - values.keys()
        require(not missing, f"{cls.__name__} needs {', '.join(sorted(missing))}")
        return cls(**values)

    def to_dict(self) -> dict:
        """The fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def replace(self, **changes) -> Self:
        """A copy with other values, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class ExpertSpec(_Spec):
    """What one expert computes: down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated.

    The activation's input is called the gate half; without a gate it is the up projection. The shared experts of a
    layer compute the same, with a width and a clamp of their own (`LayerSpec.shared_experts`).

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    dim: int
    """Width of a token, D."""
    hidden_dim: int
    """Width inside an expert, F."""
    gated: bool = True
    """Two projections in, gate and up; False: up alone (nemotron_h)."""
    activation: str = "silu"
    """silu, gelu (exact, with erf), gelu_tanh, relu, or relu2, the square of relu."""
    alpha: float = 1.0
    """alpha in z * sigmoid(alpha * z); only with silu (gpt-oss: 1.702)."""
    up_offset: float = 0.0
    """Added to the up half, after its clamp (gpt-oss: 1)."""
    clamp: float | None = None
    """The gate half is at most this, the up half at most this in size; None: no clamp."""
    clamp_at: str = "before"
    """Whether the gate half is clamped before the activation (gpt-oss) or after it (step3p7)."""
    bias: bool = False
    """All projections have a bias (gpt-oss)."""

    def __post_init__(self):
        integer("dim", self.dim, 1)
        integer("hidden_dim", self.hidden_dim, 1)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("clamp_at", self.clamp_at, ("before", "after"))
        for field in ("gated", "bias"):
            require(isinstance(getattr(self, field), bool), f"{field} is {getattr(self, field)!r}; it is a bool")
        number("alpha", self.alpha, above=0.0)
        number("up_offset", self.up_offset)
        if self.clamp is not None:
            number("clamp", self.clamp, above=0.0)
        require(
            self.alpha == 1.0 or self.activation == "silu",
            f"alpha is {self.alpha!r} with activation {self.activation!r}; only 'silu' has one",
        )
        require(self.up_offset == 0.0 or self.gated, f"up_offset is {self.up_offset!r}; without a gate it is 0.0")
        require(
            self.clamp_at == "before" or self.clamp is not None,
            f"clamp_at is {self.clamp_at!r}, but clamp is None",
        )


@dataclass(frozen=True, kw_only=True)
class SharedSpec(_Spec):
    """Experts that see every token and whose output joins the routed output.

    There is one, of any width, or as many as the router scores (`RouterSpec.num_scored_shared_experts`).
    They have the form of the routed experts, but no bias, and no clamp unless it is given here.
    """

    hidden_dim: int
    """Width inside a shared expert."""
    gate: str = "none"
    """none, or sigmoid: its output is multiplied by the sigmoid of one logit per token (qwen2_moe)."""
    combine: str = "sum"
    """sum: routed + shared; average: (routed + shared) / 2 (cohere2_moe)."""
    clamp: float | None = None
    """As in ExpertSpec, at the same place; models that clamp both say it twice (hy_v4 clamps the routed alone)."""

    def __post_init__(self):
        integer("hidden_dim", self.hidden_dim, 1)
        one_of("gate", self.gate, ("none", "sigmoid"))
        one_of("combine", self.combine, ("sum", "average"))
        if self.clamp is not None:
            number("clamp", self.clamp, above=0.0)


@dataclass(frozen=True, kw_only=True)
class LayerSpec(_Spec):
    """One Mixture-of-Experts layer: a router, its experts, and what stands beside them."""

    router: RouterSpec
    experts: ExpertSpec
    shared: SharedSpec | None = None
    """None: no shared expert."""
    gate_bias: bool = False
    """The gate has a learned bias, part of the logits (gpt-oss)."""

    def __post_init__(self):
        for field, kind in (("router", RouterSpec), ("experts", ExpertSpec), ("gate_bias", bool)):
            value = getattr(self, field)
            require(isinstance(value, kind), f"{field} is {value!r}; it is a {kind.__name__}")
        require(
            self.shared is None or isinstance(self.shared, SharedSpec),
            f"shared is {self.shared!r}; it is a SharedSpec or None",
        )
        scored = self.router.num_scored_shared_experts
        if scored:
            require(self.shared is not None, f"shared is None, but router.num_scored_shared_experts is {scored}")
        if scored and self.shared is not None:
            # Their factor is the router's weight; a second one has no public model.
            require(
                self.shared.gate == "none",
                f"shared.gate is {self.shared.gate!r}, but the router scores the {scored} shared experts",
            )

    @property
    def num_shared_experts(self) -> int:
        """S: the router-scored shared experts, else 1 where there is a shared expert, else 0."""
        return 0 if self.shared is None else max(1, self.router.num_scored_shared_experts)

    @property
    def shared_experts(self) -> ExpertSpec | None:
        """What a shared expert computes; None where there is none."""
        if self.shared is None:
            return None
        # clamp_at means nothing without a clamp, and is then the default.
        clamp_at = "before" if self.shared.clamp is None else self.experts.clamp_at
        return self.experts.replace(
            hidden_dim=self.shared.hidden_dim, clamp=self.shared.clamp, clamp_at=clamp_at, bias=False
        )

    @classmethod
    def from_dict(cls, values: dict) -> "LayerSpec":
        """A spec from nested dicts; an unknown name at any level is a ValueError."""
        parts = {"router": RouterSpec, "experts": ExpertSpec, "shared": SharedSpec}
        given = {name: value for name, value in values.items() if name not in parts or value is not None}
        return super().from_dict(
            {name: parts[name].from_dict(value) if name in parts else value for name, value in given.items()}
        )

    def to_dict(self) -> dict:
        """Nested dicts of the fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        found = super().to_dict() | {"router": self.router.to_dict(), "experts": self.experts.to_dict()}
        return found if self.shared is None else found | {"shared": self.shared.to_dict()}
