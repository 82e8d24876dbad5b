"""conformance, subject maxtext: which settings of its config make MaxText compute a spec, one row a block, as data.

What its layer computes depends on decoder_block and on the beginning of model_name (`RoutedMoE.get_topk`). A row says
which fields of RouterSpec it has under which config name (`free`), and which values others can have (`fixed`); all
others are the identity. Checked against maxtext 0.2.5.
"""

from dataclasses import asdict, dataclass
from typing import Any

from conformance.subjects.fitting import Row, first_that_fits
from moe_ref import ExpertSpec, LayerSpec, RouterSpec

SIZES = {"num_experts": "num_experts", "top_k": "num_experts_per_tok"}
GROUPS = {"num_expert_groups": "n_routing_groups", "num_limited_groups": "topk_routing_group"}
NORM = {"route_norm": "norm_topk_prob"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Block(Row):
    """A way in which RoutedMoE routes, and the specs that it computes."""

    gate_bias: bool = False
    """Whether it can have a learned bias of the gate."""
    shared: bool = False
    """Whether its models have shared experts."""

    def entries(self, values: dict[str, Any]) -> dict[str, Any]:
        """Its entries, and those of no groups and of random routing."""
        found = super().entries(values)
        for config in GROUPS.values():
            if found.get(config) is None:
                found[config] = -1
        return found | ({"use_random_routing": True} if values.get("selector") == "random" else {})


ANY_SELECTOR = {"selector": ("top_k", "given", "random")}
OWN_NORM = {"route_norm": (True,), "norm_eps": (1e-20,)}

BLOCKS = (
    Block(name="mixtral", config={"decoder_block": "mixtral", "model_name": "mixtral-8x7b"},
          free=SIZES | NORM, gate_bias=True,
          fixed={"score_over": ("selected",), "select_by": ("logit",), "route_norm": (False, True)} | ANY_SELECTOR),
    # A softmax over all that is normalised over the selected is a softmax over the selected.
    Block(name="qwen3_moe", config={"decoder_block": "qwen3_moe", "model_name": "qwen3-30b-a3b"},
          free=SIZES | NORM, gate_bias=True,
          fixed={"route_norm": (True,), "select_by": ("logit", "score")}),
    Block(name="deepseek2", config={"decoder_block": "deepseek", "model_name": "deepseek2-16b",
                                    "routed_score_func": "softmax"},
          free=SIZES | {"route_scale": "routed_scaling_factor"}, shared=True, fixed=ANY_SELECTOR),
    Block(name="deepseek3, of a softmax", config={"decoder_block": "deepseek", "model_name": "deepseek3-671b"},
          free=SIZES | GROUPS | {"route_scale": "routed_scaling_factor", "score_func": "routed_score_func"},
          expert_bias=True, shared=True, fixed=ANY_SELECTOR | {"score_func": ("softmax",)}),
    Block(name="deepseek3", config={"decoder_block": "deepseek", "model_name": "deepseek3-671b"},
          free=SIZES | GROUPS | {"route_scale": "routed_scaling_factor", "score_func": "routed_score_func"},
          expert_bias=True, shared=True,
          fixed=OWN_NORM | ANY_SELECTOR | {"score_func": ("sigmoid", "sqrtsoftplus")}),
    # An eps of 1e-20 is one of 0 but for scores that all underflow, which given ids are not judged with.
    Block(name="deepseek3, forced", config={"decoder_block": "deepseek", "model_name": "deepseek3-671b"},
          free=SIZES | {"route_scale": "routed_scaling_factor", "score_func": "routed_score_func"}, shared=True,
          fixed={"route_norm": (True,), "score_func": ("sigmoid", "sqrtsoftplus"), "selector": ("given",)}),
    Block(name="deepseek4", config={"decoder_block": "deepseek4", "model_name": "deepseek4-284b"},
          free=SIZES | {"route_scale": "routed_scaling_factor", "score_func": "routed_score_func"}, shared=True,
          fixed=OWN_NORM | {"score_func": ("sigmoid", "sqrtsoftplus"), "selector": ("table",)}),
    Block(name="llama4", config={"decoder_block": "llama4", "model_name": "llama4-17b-16e"}, free=SIZES, shared=True,
          fixed={"score_func": ("sigmoid",), "select_by": ("logit",), "weight_on": ("input",), "top_k": (1,),
                 "selector": ("top_k", "given")}),
    Block(name="gemma4", config={"decoder_block": "gemma4", "model_name": "gemma4-26b"}, free=SIZES | NORM,
          fixed={"select_by": ("logit", "score"), "route_norm": (False, True),
                 "learned_scale": ("none", "per_expert"), "selector": ("top_k", "given")}),
)  # fmt: skip
"""The first one that fits computes a spec."""

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu", "relu": "relu"}
"""Of ExpertSpec -> of jax.nn, whose gelu is the approximation unless it is told otherwise."""
DEEPSEEK = ("deepseek", "deepseek4")


def block_of(spec: RouterSpec, *, expert_bias: bool = False) -> Block:
    """The first block that computes the spec, with a balancing bias where one is wanted.

    Raises:
        ValueError: there is none; the sentence says what the nearest one lacks.
    """
    return first_that_fits(
        BLOCKS, spec, expert_bias=expert_bias, no_bias="expert_bias (none)", called="block of MaxText"
    )


def settings_of(spec: LayerSpec, *, expert_bias: bool = False) -> tuple[Block, dict[str, Any]]:
    """The block of a layer and all entries of its config that are not the defaults.

    Raises:
        ValueError: MaxText has no such layer; a sentence that says why.
    """
    if spec.latent is not None:
        raise ValueError("latent is given; MaxText's experts see the tokens")
    block = block_of(spec.router, expert_bias=expert_bias)
    values = asdict(spec.router)
    found = block.entries(values) | _experts(spec.experts)
    if spec.experts.alpha != 1:
        if block.name not in ("mixtral", "qwen3_moe"):
            raise ValueError(
                f"experts.alpha is {spec.experts.alpha} in MaxText's block gpt_oss alone, which routes as mixtral"
            )
        found |= {"decoder_block": "gpt_oss", "model_name": "gpt-oss-20b", "mlp_activations": ["sigmoid", "linear"]}
    elif spec.experts.clamp is not None and found["decoder_block"] not in DEEPSEEK:
        raise ValueError(f"experts.clamp is {spec.experts.clamp} in MaxText's blocks gpt_oss and deepseek alone")
    if spec.gate_bias and not block.gate_bias:
        raise ValueError(f"gate_bias is True; in MaxText's block {block.name} the bias is the balancing bias or none")
    found["routed_bias"] = block.expert_bias or spec.gate_bias
    if spec.shared is not None:
        found["shared_experts"] = _shared(spec, block)
    return block, found


def _experts(experts: ExpertSpec) -> dict[str, Any]:
    gpt_oss = (experts.alpha, experts.up_offset, experts.clamp is not None) == (1.702, 1.0, True)
    _only("gated", experts.gated, (True,))
    _only("activation", experts.activation, tuple(ACTIVATIONS))
    _only("clamp_at", experts.clamp_at, ("before",))
    if not gpt_oss and (experts.alpha, experts.up_offset) != (1, 0):
        raise ValueError("MaxText's experts have alpha 1.702, up_offset 1 and a clamp together, or none of them")
    return {
        "emb_dim": experts.dim,
        "moe_mlp_dim": experts.hidden_dim,
        "mlp_bias": experts.bias,
        "mlp_activations": [ACTIVATIONS[experts.activation], "linear"],
        "mlp_activations_limit": -1.0 if experts.clamp is None else experts.clamp,
    }


def _shared(spec: LayerSpec, block: Block) -> int:
    """How many; one of any width, where MaxText has several that are as wide as a routed one."""
    shared = spec.shared
    assert shared is not None
    if not block.shared:
        raise ValueError(f"MaxText's models with block {block.name} have no shared experts")
    if (shared.gate, shared.combine, shared.clamp) != ("none", "sum", None):
        raise ValueError("MaxText's shared experts have no gate and no clamp, and are summed")
    return 1


def _only(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"MaxText's experts have {name} {' or '.join(map(str, allowed))}, not {value}")
