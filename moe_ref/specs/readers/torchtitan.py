"""moe_ref, configs of torchtitan: an MoE.Config, or what holds one, as fields of our specs.

Semantics after torchtitan.models.common.moe of pytorch/torchtitan 0.3: weights are divided by their sum plus 1e-20,
    a group
is scored by its two best experts, dropped groups are -inf. The experts are SwiGLU, or those of gpt-oss, which have a
swiglu_limit.
"""

import json
import tomllib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from moe_ref.specs.checks import require
from moe_ref.specs.readers.config import Config, Irrelevant, load
from moe_ref.specs.readers.hf_row import Fields

IRRELEVANT = Irrelevant(
    (
        "load_balance_coeff", "token_dispatcher", "use_grouped_mm", "dtype", "device",
        "param_init", "sharding_config", "name",
    ),
)  # fmt: skip
STARTS = {"param_init", "sharding_config"}
"""How weights start and where they are, which is another thing in each layer."""
ROUTER = ("num_experts", "top_k", "score_func", "route_norm", "route_scale", "num_expert_groups", "num_limited_groups")
DEFAULTS: Fields = {
    "router.num_expert_groups": None, "router.num_limited_groups": None, "router.top_k": 1,
    "router.score_func": "sigmoid",
    "router.route_norm": False, "router.route_scale": 1.0, "router._debug_force_load_balance": False, "num_experts": 8,
    "router.gate.bias": False,
}  # fmt: skip
"""Of MoE.Config and TokenChoiceTopKRouter.Config."""
EXPERTS = "routed_experts.inner_experts"


def read(config: Any, *, ignore: Iterable[str] = ()) -> tuple[Fields, Config]:
    """The fields of the MoE layer of a torchtitan config, and the config, whose names messages use.

    Raises:
        ValueError: it has no MoE layer, several that differ, or a key that is unknown.
    """
    values = _plain(config if _is_config(config) else load(config, parse=_parse))
    layers = _moe_parts(values)
    require(bool(layers), "a config of torchtitan without an MoE.Config in it (moe, or routed_experts): a dense model")
    for layer in layers[1:]:
        require(layer == layers[0], "the MoE layers of this torchtitan config differ; give one of them, an MoE.Config")
    found = Config(_flat(layers[0]), "a config of torchtitan", defaults=DEFAULTS)
    router: Fields = {name: found.get(f"router.{name}", field=name) for name in ROUTER}
    for name in ("num_experts",):
        for other in (name, f"{EXPERTS}.{name}"):
            value = found.get(other, router[name])
            require(value == router[name], f"router.{name} is {router[name]!r}, but {other} is {value!r}")
    router |= {"norm_eps": 1e-20}
    if found.get("router._debug_force_load_balance"):
        router["selector"] = "round_robin"
    experts: Fields = {"dim": found.get(f"{EXPERTS}.dim", field="dim"),
                       "hidden_dim": found.get(f"{EXPERTS}.hidden_dim", field="hidden_dim")}  # fmt: skip
    if found.has(f"{EXPERTS}.swiglu_limit"):
        experts |= {"clamp": found.get(f"{EXPERTS}.swiglu_limit", field="clamp"), "alpha": 1.702, "up_offset": 1.0,
                    "bias": True}  # fmt: skip
    width = found.get("router.gate.in_features", experts["dim"])
    require(width == experts["dim"], f"router.gate.in_features is {width!r}, but {EXPERTS}.dim {experts['dim']!r}")
    columns = found.get("router.gate.out_features", router["num_experts"])
    require(columns == router["num_experts"], f"router.gate.out_features is {columns!r}, but router.num_experts "
                                              f"{router['num_experts']!r}")  # fmt: skip
    result: Fields = {"router": router, "experts": experts, "gate_bias": bool(found.get("router.gate.bias"))}
    if any(key.startswith("shared_experts.") for key in found.values):
        gated = any(key.startswith("shared_experts.gate.") for key in found.values)
        hidden = found.get("shared_experts.w1.out_features", field="shared_hidden_dim")
        result["shared"] = {"hidden_dim": hidden, "gate": "sigmoid" if gated else "none"}
    parts = ("shared_experts.", "routed_experts.token_dispatcher.", "router.gate.")
    inner = {key for key in found.values if key.startswith(parts)}
    found.finish(IRRELEVANT.and_also(inner), ignore)
    return result, found


def _is_config(config: Any) -> bool:
    return is_dataclass(config) and not isinstance(config, type)


def _parse(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)


def _plain(value: Any) -> Any:
    """Nested dicts of nested config objects; what they hold of functions and modules is left as it is."""
    if _is_config(value):
        names = [each.name for each in fields(value) if hasattr(value, each.name)]
        return {name: _plain(getattr(value, name)) for name in names if name not in STARTS}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _moe_parts(value: Any) -> list[Fields]:
    """Every MoE.Config in a tree, from the top."""
    if isinstance(value, list):
        return [part for each in value for part in _moe_parts(each)]
    if not isinstance(value, dict):
        return []
    if "router" in value and "routed_experts" in value:
        return [value]
    return [part for each in value.values() for part in _moe_parts(each)]


def _flat(values: Fields, before: str = "") -> Fields:
    """One dict, with dots in the names; parts that are None are left out."""
    found: Fields = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{key}.")
        elif value is not None or not before:
            found[f"{before}{key}"] = value
    return {key: value for key, value in found.items() if key != "shared_experts" or value is not None}
