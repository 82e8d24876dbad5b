"""moe_ref, configs of huggingface: keys of routing that a model type does not read, held against what it computes.

A file may carry the names of another code base (scoring_func beside a class that is always sigmoid). One that says what
the model does is read; one that says something else is an error, never ignored.
"""

from typing import Any

from moe_ref.specs.checks import require
from moe_ref.specs.names import METHODS
from moe_ref.specs.readers.config import ABSENT, Config
from moe_ref.specs.readers.hf_row import Fields, flagged, listed, prefix, steps, types

NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts", "n_activated_experts", "num_activated_experts", "moe_router_topk",
)  # fmt: skip
GROUPS = ("n_group", "num_expert_group", "num_expert_groups", "n_expert_groups", "n_routing_groups")
LIMITED = ("topk_group", "num_limited_groups", "n_limited_groups", "topk_routing_group")
SCORE = (
    "scoring_func", "score_func", "score_function", "moe_router_activation_func", "moe_router_activation",
    "moe_router_score_function", "router_score_function", "routed_score_func", "moe_gate_act",
)  # fmt: skip
NORM = ("norm_topk_prob", "moe_renormalize", "renormalize", "route_norm", "norm_expert_weight")
SCALE = (
    "routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_router_scaling_factor",
    "moe_routed_scaling_factor", "router_topk_scaling_factor", "moe_router_topk_scaling_factor",
)  # fmt: skip
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
SHARED_WIDTH = (
    "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
    "share_expert_dim",
)  # fmt: skip
WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_hidden_dim", "moe_ffn_hidden_size")
FLAGS = {
    "moe_apply_router_weight_on_input": lambda router: router.get("weight_on", "output") == "input",
    "apply_router_weight_on_input": lambda router: router.get("weight_on", "output") == "input",
    "moe_router_use_sigmoid": lambda router: router.get("score_func", "softmax") == "sigmoid",
    "moe_router_enable_routed_scaling": lambda router: True,
    "moe_router_enable_shared_expert": lambda router: True,
    "use_moe": lambda router: True,
    "multi_gate": lambda router: False,
}
"""Key -> whether it is true of a router."""
ALWAYS = {
    "moe_layer_freq": (1,),
    "moe_every_n_layer": (1,),
    "moe_layer_offset": (0,),
    "moe_group_experts": (False,),
    "shared_moe_mode": ("softmax", "sigmoid"),
}
"""Key -> what it says where the layers are all of one kind, or where it has no meaning."""
LAYERS = {
    "first_k_dense_replace": prefix("first_k_dense_replace"),
    "num_dense_layers": prefix("num_dense_layers"),
    "mlp_layer_types": types(lambda config, depth: ["moe"] * depth),
    "mlp_only_layers": steps,
    "decoder_sparse_step": steps,
    "is_moe_layer": flagged("is_moe_layer", lambda config, depth: ["moe"] * depth),
    "moe_layers_enum": listed("moe_layers_enum", lambda config, depth: ["moe"] * depth),
}
"""Key -> the layers that it says are sparse."""


OTHERS = frozenset((
    *NUM_EXPERTS, *TOP_K, *GROUPS, *LIMITED, *SCORE, *NORM, *SCALE, *SHARED_COUNT, *SHARED_WIDTH, *WIDTH, *FLAGS,
    *ALWAYS,
    *LAYERS, "topk_method", "use_grouped_topk",
))  # fmt: skip
"""Every key that is held against what a model does."""


def check_others(config: Config, router: Fields, sizes: Fields, kinds: list[str | None]) -> None:
    """Every key of another code base that the row did not read says what the model does."""
    score, scale = router.get("score_func", "softmax"), router.get("route_scale", 1.0) * router.get("output_scale", 1.0)
    selected = router.get("score_over", "all") == "selected"
    groups, limited = router.get("num_expert_groups"), router.get("num_limited_groups")
    shared, count, width = sizes["shared"], sizes["shared_count"], sizes["hidden_dim"]
    expected: list[tuple[tuple[str, ...], tuple]] = [
        (NUM_EXPERTS, (router["num_experts"],)),
        (TOP_K, (router["top_k"],)),
        (GROUPS, (groups,) if groups and groups > 1 else (groups, 0, 1)),
        (LIMITED, (limited,) if groups and groups > 1 else (limited, 0, 1)),
        (SCORE, (score,)),
        (NORM, (True, False) if selected else (router.get("route_norm", False),)),
        (SCALE, (scale, False) if scale == 1 else (scale,)),  # False is how files of Hunyuan say that there is none
        (SHARED_COUNT, (count,) if shared else (0,)),
        (SHARED_WIDTH, (shared,) if shared else (0,)),
        (WIDTH, (width,)),
    ]
    if shared is ABSENT:  # the file does not say it, and only the router is read
        config.read |= config.values.keys() & {*SHARED_COUNT, *SHARED_WIDTH, *WIDTH}
        expected = expected[:-3]
    for names, valid in expected:
        for name in names:
            _one(config, name, valid)
    _method(config, router)
    for name, holds in FLAGS.items():
        _one(config, name, (holds(router),))
    for name, valid in ALWAYS.items():
        if not isinstance(config.values.get(name), list):
            _one(config, name, valid)
    if "moe_layer_freq" not in config.read and config.has("moe_layer_freq"):
        said = flagged("moe_layer_freq", lambda config, depth: ["moe"] * depth)(config, len(kinds))
        same = [kind is None for kind in said] == [kind is None for kind in kinds]
        require(same, f"moe_layer_freq says that other layers are sparse than {config.what} has")
    if "use_grouped_topk" in config.values:  # which means nothing with one group
        valid = (True,) if groups and groups > 1 else (True, False)
        _one(config, "use_grouped_topk", valid)
    depth = len(kinds)
    for name, layers in LAYERS.items():
        if name not in config.read and config.has(name):
            said = layers(config, depth)
            wrong = [i for i in range(depth) if (said[i] is None) != (kinds[i] is None)]
            require(
                not wrong,
                f"{name} says that layer {wrong[:1]} is {'sparse' if wrong and said[wrong[0]] else 'dense'}, which "
                f"{config.what} does not read and does not do",
            )
        elif name in config.values:
            config.read.add(name)


def _method(config: Config, router: Fields) -> None:
    """topk_method says how experts are chosen: by what, and whether in groups."""
    method = config.values.get("topk_method")
    if "topk_method" in config.read or method is None:
        config.read.add("topk_method")
        return
    require(isinstance(method, str) and method in METHODS, f"topk_method is {method!r}, not one of {sorted(METHODS)}")
    groups = router.get("num_expert_groups") or 1
    by_best = router.get("group_score_k", 2) == 1
    holds = {
        "noaux_tc": not by_best and router.get("score_func", "softmax") != "softmax",
        "greedy": groups == 1,
        "group_limited_greedy": groups > 1 and by_best,
    }
    require(holds[method], f"topk_method is {method!r}, which {config.what} does not compute")
    config.read.add("topk_method")


def _one(config: Config, name: str, valid: tuple[Any, ...]) -> None:
    """A key that the row did not read has one of the values, or is null."""
    if name in config.read or name not in config.values:
        return
    value = config.values[name]
    entries = value if isinstance(value, list) else [value]
    config.read.add(name)
    require(
        value is None or all(any(entry == each for each in valid) for entry in entries),
        f"{name} is {value!r}; {config.what} does not read it, and computes "
        f"{' or '.join(map(repr, dict.fromkeys(valid)))}",
    )
