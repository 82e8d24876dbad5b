"""moe_ref, upcycling: the parameters of a layer from those of a dense feed-forward.

Granularity G is the dense width over that of an expert. With 1 every expert is a copy (arXiv:2212.05055). With more,
expert e is part e % G of the dense one, and the G experts from a multiple of G on, a virtual group, have one row of the
gate in common: they tie, so that a token chooses whole groups (arXiv:2410.07524; `moe_upcycling_granularity` of
Megatron-Core, transformer/moe/upcycling_utils.py). Then the parts of a token's groups add up to the dense output, times
a factor that the weights of the experts take out again.

Legend: E experts, G granularity, D model dim, F width of the dense feed-forward, K top_k.
"""

import numpy as np

from moe_ref.specs.checks import number, one_of, require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import FeedForward, LayerParams, param_shapes


def granularity(dense: FeedForward, spec: LayerSpec) -> int:
    """G: how many experts hold one copy of the dense feed-forward.

    Raises:
        ValueError: the layer cannot be made of it; it names field, value and bound.
    """
    router, experts, (D, F) = spec.router, spec.experts, dense.w_up_DF.shape
    require(experts.dim == D, f"experts.dim is {experts.dim}; the dense tokens have {D} numbers")
    require(F % experts.hidden_dim == 0, f"experts.hidden_dim is {experts.hidden_dim}, which does not divide {F}")
    G = F // experts.hidden_dim
    require(router.num_experts % G == 0, f"router.num_experts is {router.num_experts}, no multiple of {G} parts")
    require(spec.shared is None, "shared is given; the dense feed-forward becomes routed experts alone")
    require(
        router.num_null_experts == 0, f"router.num_null_experts is {router.num_null_experts}; a choice of one adds 0"
    )
    require(router.weight_on == "output", f"router.weight_on is {router.weight_on!r}; the weights stand on the output")
    scales = router.route_scale * router.output_scale
    require(scales > 0, f"router.route_scale * router.output_scale is {scales}; nothing makes up for it")
    for name, has in (("gated", dense.w_gate_DF is not None), ("bias", dense.b_up_F is not None)):
        ours = getattr(experts, name)
        require(ours == has, f"experts.{name} is {ours}, and the dense feed-forward {'has' if has else 'lacks'} that")
    return G


def why_not_exact(spec: LayerSpec, G: int, *, scale_on: str = "down") -> str:
    """Why the upcycled layer is not the dense feed-forward at the start; empty: it is, up to rounding."""
    router, experts = spec.router, spec.experts
    if not sums_to_one(spec):
        return "the weights of a token do not sum to a constant: neither route_norm nor a softmax over the selected"
    if router.top_k % G:
        return f"top_k is {router.top_k}, no multiple of the {G} parts, so that a token has some of them more often"
    if router.selector != "top_k" or router.num_expert_groups not in (None, 1):
        return "the parts of a virtual group tie where the best logits of all experts are chosen alone"
    if G > 1 and scale_on == "all" and (experts.gated or experts.activation not in ("relu", "relu2")):
        return "a factor on what goes into the activation is none on what comes out; scale_on 'down' has no such factor"
    return ""


def sums_to_one(spec: LayerSpec) -> bool:
    """Whether a token's weights sum to 1, route_scale aside."""
    router = spec.router
    normed = router.route_norm and router.norm_p == 1 and router.norm_eps <= 1e-12 and not router.norm_with_shared
    return (normed or router.score_over == "selected") and router.learned_scale == "none"


def upcycle(
    dense: FeedForward, spec: LayerSpec, *, seed: int = 0, gate_std: float = 0.02, scale_on: str = "down"
) -> LayerParams:
    """The parameters of a layer whose experts are parts, or copies, of a dense feed-forward.

    Args:
        dense: its weights; of the form of `spec.experts`, G times as wide.
        spec: of the layer, without shared experts.
        seed, gate_std: of the rows of the gate, one for each virtual group.
        scale_on: what has the factor that makes up for the weights: down, the down projection, which is exact; or all
            projections alike, as Megatron does (the cube root on each of three, or where relu2 squares; else the root).

    Raises:
        ValueError: the layer cannot be made of it; it names field, value and bound.
    """
    one_of("scale_on", scale_on, ("down", "all"))
    number("gate_std", gate_std, low=0.0)
    G, E, K = granularity(dense, spec), spec.router.num_experts, spec.router.top_k
    # Weights that sum to 1 give each part 1 / G of it; those of a softmax over all experts are 1 / E each at the start.
    factor = float(G) if sums_to_one(spec) else E * G / K
    unit = spec.router.route_scale * spec.router.output_scale
    roots = 3 if spec.experts.gated or spec.experts.activation == "relu2" else 2
    inner = factor ** (1 / roots) if scale_on == "all" else 1.0
    # What goes in counts for all projections before the last: the activation squares it, or a gate multiplies it.
    outer = (inner if scale_on == "all" else factor) / unit

    def parts(values: np.ndarray | None, axis: int, by: float) -> np.ndarray | None:
        return None if values is None else by * np.stack(np.split(np.asarray(values), G, axis=axis) * (E // G))

    rows_ED = gate_std * np.random.default_rng(seed).standard_normal((E // G, spec.experts.dim))
    w_up_EDF, w_down_EFD = parts(dense.w_up_DF, 1, inner), parts(dense.w_down_FD, 0, outer)
    assert w_up_EDF is not None
    assert w_down_EFD is not None
    scale_shape = param_shapes(spec)["learned_scale"]
    made = LayerParams(
        gate_ED=np.repeat(rows_ED, G, axis=0),
        gate_bias_E=np.zeros(E) if spec.gate_bias else None,
        learned_scale=None if scale_shape is None else np.ones(scale_shape),
        w_up_EDF=w_up_EDF,
        w_down_EFD=w_down_EFD,
        w_gate_EDF=parts(dense.w_gate_DF, 1, inner),
        b_up_EF=parts(dense.b_up_F, 0, inner),
        b_gate_EF=parts(dense.b_gate_F, 0, inner),
        # In every slot, and a token's weights sum to 1.
        b_down_ED=None if dense.b_down_D is None else np.tile(np.asarray(dense.b_down_D) / unit, (E, 1)),
    )
    made.check(spec)
    return made
