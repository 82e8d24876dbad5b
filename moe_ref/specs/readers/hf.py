"""moe_ref, configs of huggingface: from a config.json, a dict or a config object to the fields of our specs.

`model_type` decides what a file does not say. This module gives plain fields; `LayerSpec.from_hf` and
`RouterSpec.from_hf` make specs of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_ref.specs.checks import integer, nearest, number, require
from moe_ref.specs.names import dtype_named
from moe_ref.specs.readers.config import ABSENT, Config, load
from moe_ref.specs.readers.hf_defaults import DEFAULTS, SYNONYMS
from moe_ref.specs.readers.hf_irrelevant import IRRELEVANT, SAMPLING
from moe_ref.specs.readers.hf_others import OTHERS, check_others
from moe_ref.specs.readers.hf_row import ACTIVATIONS, Fields, Row, Shared
from moe_ref.specs.readers.hf_rows import BY_MODEL_TYPE, NO_ROUTER

NESTED = ("text_config", "llm_config", "language_config", "text_model_config", "thinker_config")
"""Where a file with several parts has its language model."""
INTEGERS = {"num_experts", "top_k", "num_expert_groups", "num_limited_groups", "num_null_experts", "quota_groups",
            "num_scored_shared_experts"}  # fmt: skip
NUMBERS = {"route_scale", "output_scale", "logit_scale", "norm_eps", "mixer_eps"}
"""Fields of RouterSpec that rows read, by what they are: other values would fail before a spec looks at them."""
BY_HAND = (
    "write the spec by hand, LayerSpec(router=RouterSpec(num_experts=..., top_k=...), experts=ExpertSpec(dim=..., "
    "hidden_dim=...)), or change that of a family, moe_ref.specs.families.preset(NAME, ...)"
)


class DenseModel(ValueError):
    """A config of a model without experts."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a file says, layer by layer."""

    row: Row
    config: Config
    kinds: tuple[str | None, ...]
    """moe, hash or None, for each decoder layer."""

    def router(self, layer: int) -> Fields:
        """The fields of the router of a layer."""
        config = self.config.at(layer)
        found = _router(config, self.row, self.kinds[layer] or "moe")
        # Of Ling, LongCat and others: serving code reads it, the class of transformers is float32 whatever it says.
        key = next((key for key in ("router_dtype", "moe_router_dtype") if config.has(key)), None)
        return found if key is None else found | {"router_dtype": dtype_named(config.get(key, field="router_dtype"))}

    def layer(self, layer: int) -> Fields:
        """The fields of a sparse layer: router, experts, shared, gate_bias.

        Raises:
            ValueError: no LayerSpec describes what the code computes, and why.
        """
        row, config = self.row, self.config.at(layer)
        why = row.cannot if isinstance(row.cannot, str) else row.cannot(config)
        require(
            not why,
            f"no LayerSpec describes a layer of {config.what}: {why}; RouterSpec.from_hf(config) reads its router",
        )
        router, experts = self.router(layer), _experts(config, row)
        found = {"router": router, "experts": experts, "gate_bias": row.gate_bias}
        latent = _latent(config, row)
        found |= {} if latent is None else {"latent": latent}
        shared = None if row.shared is None else _shared(config, row.shared, experts)
        return found if shared is None else found | {"shared": shared}

    @property
    def sparse(self) -> list[int]:
        """The sparse layers."""
        return [i for i, kind in enumerate(self.kinds) if kind is not None]


def read(config: Any, *, ignore: Iterable[str] = ()) -> Reading:
    """What a config says.

    Args:
        config: a dict, the path of a config.json or of its folder, or a config object of transformers.
        ignore: keys that the reader does not know, and that do not concern the MoE layers.

    Raises:
        ValueError: it is no config of a known model with experts, a key is unknown, or keys contradict each other.
    """
    values, outer = language_part(load(config))
    row = row_of(values)
    values = row.prepare(values) if row.prepare else values
    name = row.model_types[0]
    own_name = values.get("model_type") or name
    found = Config(
        values, f"a config of {own_name}", defaults=dict(row.defaults) | DEFAULTS.get(name, {}),
        synonyms=SYNONYMS.get(name, {}) | dict(row.also),
    )  # fmt: skip
    found.per_layer = frozenset(row.per_layer)
    ignored = [key for key in ignore if key in values or key not in outer]
    irrelevant = IRRELEVANT.and_also(row.irrelevant)
    try:
        reading = _read(found, row)
    except DenseModel:
        raise
    except ValueError:
        # Where a key is misspelt, that is the cause.
        found.read |= row.keys | OTHERS | _layer_keys(found) | {"hidden_act"}
        found.finish(irrelevant, ignored)
        raise
    found.finish(irrelevant, ignored)
    return reading


def _read(found: Config, row: Row) -> Reading:
    """What a config says, its keys checked against each other."""
    depth = _depth(found, row)
    kinds = row.layers(found, depth)
    experts = found.get(row.router["num_experts"], None)
    reading = Reading(row=row, config=found, kinds=tuple(kinds))
    found.read |= row.keys
    if not reading.sparse or experts == 0:
        of_experts = f" ({row.router['num_experts']} is {experts!r})" if not experts else ""
        raise DenseModel(
            f"{found.what} has no layer with experts: it is a dense model, or all its layers are{of_experts}"
        )
    first = reading.sparse[0]
    router = reading.router(first)
    if row.activation != "hidden_act":
        found.only("hidden_act", _activations_of(found, row))
    check_others(found, router, _sizes(reading, first), kinds)
    for key in SAMPLING & found.values.keys():
        require(
            key != "top_k" or found.has(row.router["top_k"]),
            f"{row.router['top_k']} is missing, and top_k ({found.values[key]!r}) is the parameter of sampling",
        )
    return reading


def _layer_keys(config: Config) -> set[str]:
    """Keys of the config that name layers, which a row may not have come to."""
    return {key for key in config.values if "layer" in key or key.startswith("hybrid_") or key == "num_hash_layers"}


def language_part(values: Fields) -> tuple[Fields, Fields]:
    """The part of a config that is about the language model, and what stands around it.

    Raises:
        ValueError: what stands around it says something else of the routing.
    """
    named = values.get("model_type")
    require(named is None or isinstance(named, str), f"model_type is {named!r}; it is a name")
    for name in NESTED:
        inner = values.get(name)
        if inner is not None and hasattr(inner, "to_dict"):
            inner = inner.to_dict()
        if not isinstance(inner, dict) or not inner:
            continue
        outer = {key: value for key, value in values.items() if key != name}
        known = values.get("model_type")
        inner = {"model_type": known} | inner if known in BY_MODEL_TYPE and not _has_type(inner) else dict(inner)
        found, _ = language_part(inner)
        for key in outer.keys() & found.keys() - {"model_type", "architectures"}:
            doubled = IRRELEVANT.speaks_of_routing(key) and outer[key] != found[key]
            require(not doubled, f"{key} is {outer[key]!r}, but in {name} {found.get(key)!r}")
        lost = sorted(key for key in outer.keys() - found.keys() if _speaks_of_experts(key))
        require(not lost, f"{lost[:1]} is beside {name}, not in it; the keys of the language model are read inside")
        return found, outer
    return values, {}


def row_of(values: Fields) -> Row:
    """The row of the model type that a file names.

    Raises:
        ValueError: it names none, one without experts, or an unknown one.
    """
    named, name = values.get("model_type"), _model_type(values)
    if name in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[name]
    require(name not in NO_ROUTER, f"no RouterSpec describes the routing of {name}: {NO_ROUTER.get(str(name))}")
    expert_keys = sorted(key for key in values if _speaks_of_experts(key))
    if not expert_keys:
        what = f"model_type {named!r}" if named else "the config, which has no model_type,"
        raise DenseModel(f"{what} names no experts in any key: it is a dense model, which has no MoE layers")
    require(bool(named), "model_type is missing; it decides what the file does not say of its routing")
    hint = nearest(str(name), BY_MODEL_TYPE)
    hint = hint if "did you mean" in hint else ""
    raise ValueError(
        f"unknown model_type {name!r}{hint}, which has experts ({expert_keys[0]}); read it as another model_type that "
        f"computes the same, or {BY_HAND}"
    )


def _has_type(values: Fields) -> bool:
    return _model_type(values) in BY_MODEL_TYPE


def _model_type(values: Fields) -> str | None:
    """The model type, or what its architecture says where there is none; None too for what is no name."""
    name = values.get("model_type")
    if not isinstance(name, str | None):
        return None
    architectures = values.get("architectures") or []
    if name == "bailing_moe" and any("V2" in each for each in architectures):  # Ling 2.0, under the name of Ling
        return "bailing_moe_v2"
    if name == "git" and "Grok1ForCausalLM" in architectures:  # the file of Grok-2 says so
        return "grok_2"
    if name:
        return name
    plain = {each.replace("_", ""): each for each in BY_MODEL_TYPE}
    for each in architectures:
        stem = each.lower().replace("_", "")
        for suffix in ("forcausallm", "forconditionalgeneration", "model"):
            stem = stem.removesuffix(suffix)
        if stem in plain:
            return plain[stem]
    return None


def _speaks_of_experts(key: str) -> bool:
    return any(word in key.lower() for word in ("expert", "moe", "router", "routed"))


def _depth(config: Config, row: Row) -> int:
    """The number of decoder layers."""
    listed = config.get("layers_block_type", None) if row.family == "nemotron_h" else None
    pattern = config.get("hybrid_override_pattern", None) if row.family == "nemotron_h" else None
    there = listed if listed is not None else pattern
    if there is not None:
        depth = len(there)
        said = config.get(row.depth, None)
        require(said in (None, depth), f"{row.depth} is {said!r}, but {depth} layers are listed")
        return depth
    return config.whole(row.depth, low=1)


def _router(config: Config, row: Row, kind: str) -> Fields:
    found = dict(row.fixed)
    for field, key in row.router.items():
        found[field] = config.get(key, field=field)
    _hold_numbers(config, {field: found[field] for field in row.router if found[field] is not None})
    for field, key in (("route_scale", "scale"), ("output_scale", "scale")):
        if field in row.router:
            value = found[field]
            require(
                value != 0, f"{config.names[field]} is 0, which would switch every expert off; a {key} of none is null"
            )
            found[field] = 1.0 if value is None else value
    if "route_norm" in row.router:
        found["route_norm"] = (
            bool(found["route_norm"]) if found["route_norm"] in (None, True, False) else found["route_norm"]
        )
    if "score_func" in row.router and found["score_func"] is None:
        found["score_func"] = config.defaults[row.router["score_func"]]
    if "num_null_experts" in row.router:
        found["num_null_experts"] = found["num_null_experts"] or 0
    for field in ("num_experts", "top_k"):
        name = config.names[field]
        how = "null" if name in config.values else "missing"
        require(found[field] is not None, f"{name} is {how}; {config.what} needs a number")
    for key, valid in row.only.items():
        config.only(key, valid)
    _no_groups(config, found)
    if row.adjust is not None:
        row.adjust(config, found, kind)
    if found.get("num_expert_groups") is None:
        found = {key: value for key, value in found.items() if key not in ("mask_fill", "num_limited_groups")}
        found.pop("num_expert_groups", None)
    return found


def _hold_numbers(config: Config, router: Fields) -> None:
    """What is to be an integer or a number is one."""
    for field in INTEGERS & router.keys():
        whole = isinstance(router[field], int) and not isinstance(router[field], bool)
        require(whole, f"{config.names[field]} is {router[field]!r}; it is an integer")
    for field in NUMBERS & router.keys():
        number(config.names[field], router[field])


def _no_groups(config: Config, router: Fields) -> None:
    """Null and 0 for both fields of the groups mean that there are none; for one of them they contradict the other."""
    if "num_expert_groups" not in router:
        return
    groups, limited = router["num_expert_groups"], router["num_limited_groups"]
    names = config.names["num_expert_groups"], config.names["num_limited_groups"]
    if not groups and (not limited or limited == 1):
        router |= {"num_expert_groups": None, "num_limited_groups": None}
        return
    require(bool(groups) and bool(limited), f"{names[0]} is {groups!r}, but {names[1]} is {limited!r}")


def _experts(config: Config, row: Row) -> Fields:
    found: Fields = {"dim": config.get(row.dim, field="dim"), "hidden_dim": config.get(row.width, field="hidden_dim")}
    for field in found:
        integer(config.names[field], found[field], 1)
    found |= row.experts
    if row.activation:
        found["activation"] = _activation(config, row.activation)
        if found["activation"] == "situ":
            require(bool(row.beta), f"{row.activation} is 'situ', which {config.what} has no beta for")
            found["beta"] = config.get(row.beta, field="beta")
            found["linear_beta"] = config.get(row.linear_beta, None, field="linear_beta")
    if row.alpha:
        found["alpha"] = config.get(row.alpha, field="alpha")
    if row.clamp:
        limit = config.get(row.clamp, field="clamp")
        found["clamp"] = None if limit in (None, 0, 0.0, float("inf")) else limit
        if found["clamp"] is None:
            found.pop("clamp_at", None)
    return found


def _latent(config: Config, row: Row) -> Fields | None:
    width = config.get(row.latent, None) if row.latent else None
    if not width:
        return None
    integer(row.latent, width, 1)  # here, since the `dim` of an error would be that of the tokens
    has_norm = row.latent_norm and config.get(row.latent_norm, False)
    return {"dim": width, "norm_eps": config.get(row.norm_eps) if has_norm else None}


def _activation(config: Config, key: str) -> str:
    said = config.get(key, field="activation")
    require(
        isinstance(said, str) and said in ACTIVATIONS,
        f"{key} is {said!r}, not one of {sorted(ACTIVATIONS)}{nearest(str(said), ACTIVATIONS)}",
    )
    return ACTIVATIONS[said]


def _activations_of(config: Config, row: Row) -> tuple:
    """What hidden_act may say where it is not the key of the experts' activation."""
    if row.activation or "hidden_act" in row.only:
        return tuple(row.only.get("hidden_act", ())) or (*ACTIVATIONS, config.values.get("hidden_act"))
    return ("silu", "swish")


def _shared(config: Config, shared: Shared, experts: Fields) -> Fields | None:
    width = experts["hidden_dim"]
    if shared.count:
        count = config.get(shared.count, field="num_shared_experts")
        if not count:
            return None
        require(
            isinstance(count, int) and count >= 1 and not isinstance(count, bool),
            f"{config.names['num_shared_experts']} is {count!r}; it is an integer of at least 0",
        )
        require(
            not shared.width or count == 1,
            f"{shared.count} is {count!r}; {config.what} has one shared expert, as wide as {shared.width} says",
        )
        width = count * (config.get(shared.each) if shared.each else width)
    if shared.width:
        width = config.get(shared.width, field="shared_hidden_dim")
        if not width:
            return None
    found: Fields = {"hidden_dim": width, "gate": shared.gate}
    if shared.combine:
        found["combine"] = config.get(shared.combine)
    if shared.clamp == "same":
        found["clamp"] = experts.get("clamp")
    elif shared.clamp != "none":
        limit = config.get(shared.clamp)
        found["clamp"] = limit or None
    return found


def _sizes(reading: Reading, layer: int) -> Fields:
    """What other keys are held against, as far as the file has it: widths, and whether there is a shared expert."""
    config, row = reading.config.at(layer), reading.row
    width = config.get(row.width, None) if row.width in config.defaults or config.has(row.width) else None
    if width is not None:
        integer(row.width, width, 1)
    found: Fields = {"hidden_dim": width, "shared": None, "shared_count": 0, "router": reading.router(layer)}
    if row.shared is None:
        return found
    needed = [key for key in (row.shared.count, row.shared.width, row.shared.each) if key]
    if width is None or not all(config.has(key) or key in config.defaults for key in needed):
        return found | {"shared": ABSENT}
    shared = _shared(config, row.shared, {"hidden_dim": width})
    scored = found["router"].get("num_scored_shared_experts")
    if shared is not None:
        count = scored or (config.get(row.shared.count) if row.shared.count else 1)
        found |= {"shared": shared["hidden_dim"], "shared_count": count}
    return found
