"""conformance, subject megatron: which entries of a TransformerConfig make Megatron-Core compute a spec, as data.

Rows are those of `fitting`. Checked against megatron-core 0.19.2 without Transformer Engine.
"""

from dataclasses import asdict, dataclass
from typing import Any

from conformance.subjects.fitting import Row, first_that_fits, inert_fields
from moe_ref import CapacitySpec, ExpertSpec, LayerSpec, RouterSpec

SIZES = {"num_experts": "num_moe_experts", "top_k": "moe_router_topk"}
GROUPS = {"num_expert_groups": "moe_router_num_groups", "num_limited_groups": "moe_router_group_topk"}
SCALE = {"route_scale": "moe_router_topk_scaling_factor"}
DTYPES = {"float32": "fp32", "float64": "fp64"}
CHOICE = {"selector": ("top_k", "given"), "router_dtype": tuple(DTYPES)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Way(Row):
    """A way in which TopKRouter routes, and the specs that it computes."""

    one_slot: bool | None = None
    """Whether top_k is 1, or is not; None: either."""

    def inert(self, spec: RouterSpec) -> set[str]:
        """group_score_k is of a sort of its own (`why_not_groups`); with another fill no dropped group is chosen."""
        return inert_fields(spec) | {"group_score_k"} | ({"weights_from"} if spec.mask_fill != 0 else set())

    def mismatches(self, spec: RouterSpec) -> list[str]:
        """Those of its fields, after the number of slots."""
        found = super().mismatches(spec)
        if self.one_slot is not None and self.one_slot != (spec.top_k == 1):
            found.insert(0, f"top_k ({'1' if self.one_slot else 'more than 1'}, not {spec.top_k})")
        return found

    def entries(self, values: dict[str, Any]) -> dict[str, Any]:
        """Its entries, and those of the dtype and of replay."""
        found = super().entries(values)
        found["moe_router_dtype"] = DTYPES[values.get("router_dtype", "float32")]
        found["moe_enable_routing_replay"] = values.get("selector") == "given"
        if found.get("moe_router_topk_scaling_factor") == 1:
            found["moe_router_topk_scaling_factor"] = None
        return found


ON_INPUT = {"weight_on": ("output", "input")}
SCORE = {"score_func": "moe_router_score_function"}
EACH_ALONE = {"score_func": ("sigmoid", "sqrtsoftplus")}
NORMED = {"route_norm": (True,), "norm_eps": (1e-20,)}
BALANCING = "moe_router_load_balancing_type"
SOFTMAX: dict[str, Any] = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}
SELECTED = SOFTMAX | {"moe_router_pre_softmax": False}
QUANTILES: dict[str, Any] = {BALANCING: "quantile_balancing"}
BY_LOGIT = {"select_by": ("logit",), "router_dtype": tuple(DTYPES)}
WAYS = (
    # A softmax over all that is normalised over the selected is a softmax over the selected.
    Way(name="a softmax over the selected", one_slot=False, free=SIZES | GROUPS | SCALE, config=SELECTED,
        fixed={"score_over": ("selected",), "select_by": ("logit",), "route_norm": (False, True)} | CHOICE),
    Way(name="a softmax over the selected, without groups", one_slot=False, free=SIZES | SCALE, config=SELECTED,
        fixed={"route_norm": (True,), "select_by": ("logit", "score")} | CHOICE),
    Way(name="a softmax over all", free=SIZES | GROUPS | SCALE, one_slot=False, config=SOFTMAX, fixed=CHOICE),
    Way(name="a softmax over all, of one slot", free=SIZES | GROUPS | SCALE, one_slot=True, config=SOFTMAX,
        fixed=CHOICE | ON_INPUT),
    Way(name="normed scores", free=SIZES | GROUPS | SCALE | SCORE, one_slot=False, expert_bias=True, config={},
        fixed=EACH_ALONE | NORMED | CHOICE),
    # An eps of 1e-20 is one of 0 but for scores that nearly underflow, which `route` refuses.
    Way(name="normed scores of given ids", free=SIZES | SCALE | SCORE, one_slot=False, config={},
        fixed=CHOICE | EACH_ALONE | {"route_norm": (True,), "selector": ("given",)}),
    Way(name="one score", free=SIZES | GROUPS | SCALE | SCORE, one_slot=True, expert_bias=True, config={},
        fixed=EACH_ALONE | CHOICE | ON_INPUT),
    Way(name="sinkhorn", free=SIZES, one_slot=False, config={BALANCING: "sinkhorn"},
        fixed={"selector": ("sinkhorn",)} | BY_LOGIT),
    Way(name="sinkhorn, of one slot", free=SIZES, one_slot=True, config={BALANCING: "sinkhorn"},
        fixed={"selector": ("sinkhorn",), "score_func": ("sigmoid",)} | BY_LOGIT | ON_INPUT),
    # Its bias ranks logits, whatever they are scored with.
    Way(name="quantile balancing of a softmax over the selected", free=SIZES | SCALE, one_slot=False, expert_bias=True,
        config=QUANTILES | SELECTED, fixed={"score_over": ("selected",), "route_norm": (False, True)} | BY_LOGIT),
    Way(name="quantile balancing of a normed softmax", free=SIZES | SCALE, one_slot=False, expert_bias=True,
        config=QUANTILES | SELECTED, fixed={"route_norm": (True,)} | BY_LOGIT),
    Way(name="quantile balancing of a softmax over all", free=SIZES | SCALE, one_slot=False, expert_bias=True,
        config=QUANTILES | SOFTMAX, fixed=BY_LOGIT),
    Way(name="quantile balancing of a softmax over all, of one slot", free=SIZES | SCALE, one_slot=True,
        expert_bias=True, config=QUANTILES | SOFTMAX, fixed=BY_LOGIT | ON_INPUT),
    Way(name="quantile balancing of normed scores", free=SIZES | SCALE | SCORE, one_slot=False, expert_bias=True,
        config=QUANTILES, fixed=EACH_ALONE | NORMED | BY_LOGIT),
    Way(name="quantile balancing of one score", free=SIZES | SCALE | SCORE, one_slot=True, expert_bias=True,
        config=QUANTILES, fixed=EACH_ALONE | BY_LOGIT | ON_INPUT),
)  # fmt: skip
"""The first one that fits computes a spec."""

ACTIVATIONS = {
    ("silu", 1.0): "silu", ("silu", 1.702): "quick_gelu", ("gelu", 1.0): "gelu", ("gelu_tanh", 1.0): "fast_gelu",
    ("relu", 1.0): "relu", ("relu2", 1.0): "squared_relu",
}  # fmt: skip
"""(activation, alpha) of ExpertSpec -> the name of its function."""


def way_of(spec: RouterSpec, *, expert_bias: bool = False) -> Way:
    """The first way that computes the spec, with a balancing bias where one is wanted.

    Raises:
        ValueError: there is none; the sentence says what the nearest one lacks.
    """
    if why := why_not_groups(spec):
        raise ValueError(why)
    return first_that_fits(
        WAYS,
        spec,
        expert_bias=expert_bias,
        no_bias="expert_bias (of normed scores, or of logits)",
        called="way of Megatron",
    )


def why_not_groups(spec: RouterSpec) -> str | None:
    """A sentence where Megatron scores groups by another number of experts, or None."""
    groups, kept = spec.num_expert_groups, spec.num_limited_groups
    if groups is None or kept is None or groups == kept:
        return None
    if spec.top_k < kept:
        return f"top_k is {spec.top_k}: in Megatron every one of more kept groups ({kept}) would score 0"
    if spec.group_score_k != spec.top_k // kept:
        return f"Megatron scores a group by its top_k // kept groups best experts, {spec.top_k // kept}"
    return None


def router_entries(spec: RouterSpec, *, expert_bias: bool = False) -> dict[str, Any]:
    """The entries of a router.

    Raises:
        ValueError: Megatron has no such router; a sentence that says why.
    """
    values = asdict(spec)
    if spec.route_scale == 0:
        raise ValueError("route_scale is 0, which is no scale in Megatron")
    found = way_of(spec, expert_bias=expert_bias).entries(values)
    of_quantiles = found.get(BALANCING) == QUANTILES[BALANCING]
    if of_quantiles and spec.top_k == spec.num_experts:
        raise ValueError("Megatron's quantile balancing looks at the expert after the chosen ones, so that one is left")
    return found | {"moe_router_enable_expert_bias": expert_bias and not of_quantiles}


def layer_entries(spec: LayerSpec, *, expert_bias: bool = False) -> dict[str, Any]:
    """All entries of a layer that are not the defaults.

    Raises:
        ValueError: Megatron has no such layer; a sentence that says why.
    """
    found = router_entries(spec.router, expert_bias=expert_bias) | _experts(spec.experts)
    if spec.latent is not None:
        raise ValueError("Megatron's latent projections are of Transformer Engine, which is not installed")
    if spec.gate_bias != spec.experts.bias:
        raise ValueError(
            f"gate_bias is {spec.gate_bias} and experts.bias {spec.experts.bias}; Megatron's add_bias_linear is both"
        )
    if spec.router.weight_on == "input":
        found["moe_apply_probs_on_input"] = True
    return found | _shared(spec)


def capacity_entries(capacity: CapacitySpec | None) -> dict[str, Any]:
    """Those of a capacity, on one rank.

    Raises:
        ValueError: Megatron has no such capacity; a sentence that says why.
    """
    if capacity is None:
        return {}
    orders = {"first_come": "position", "by_weight": "probs"}
    if capacity.factor is None or capacity.min_slots:
        raise ValueError("Megatron's capacity is a factor, and nothing at least")
    if (capacity.rounding, capacity.renormalise, capacity.then) != ("ceil", "no", None):
        raise ValueError("Megatron rounds a capacity up, keeps the weights as they are, and has one limit")
    if capacity.drop_order not in orders:
        raise ValueError(f"drop_order is {capacity.drop_order!r}; Megatron drops by position or by probs")
    if capacity.scope == "sequence":
        raise ValueError("Megatron's capacity is of the tokens of a rank, not of each sequence")
    return {
        "moe_expert_capacity_factor": capacity.factor,
        "moe_token_drop_policy": orders[capacity.drop_order],
        "moe_pad_expert_input_to_capacity": capacity.pad_to_capacity,
    }


def _experts(experts: ExpertSpec) -> dict[str, Any]:
    activation = ACTIVATIONS.get((experts.activation, experts.alpha))
    if activation is None:
        raise ValueError(f"Megatron has no activation {experts.activation} with alpha {experts.alpha}")
    if experts.clamp_at != "before":
        raise ValueError(f"clamp_at is {experts.clamp_at!r}; Megatron clamps before the activation")
    if experts.clamp is not None and not experts.gated:
        raise ValueError("Megatron clamps gated experts alone")
    return {
        "hidden_size": experts.dim,
        "moe_ffn_hidden_size": experts.hidden_dim,
        "gated_linear_unit": experts.gated,
        "activation_func": activation,
        "glu_linear_offset": experts.up_offset,
        "activation_func_clamp_value": experts.clamp,
        "add_bias_linear": experts.bias,
    }


def _shared(spec: LayerSpec) -> dict[str, Any]:
    shared = spec.shared
    if shared is None:
        return {}
    if shared.combine != "sum":
        raise ValueError(f"shared.combine is {shared.combine!r}; Megatron sums")
    if shared.clamp != spec.experts.clamp:
        raise ValueError(f"shared.clamp is {shared.clamp}; Megatron has that of the experts, {spec.experts.clamp}")
    if spec.experts.bias:
        raise ValueError("Megatron's shared experts have no bias, and refuse experts that have one")
    return {
        "moe_shared_expert_intermediate_size": shared.hidden_dim,
        "moe_shared_expert_gate": shared.gate == "sigmoid",
    }
