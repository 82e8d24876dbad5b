"""moe_ref, configs of huggingface: what a row says of a model type, and which decoder layers are sparse."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_ref.specs.checks import require
from moe_ref.specs.readers.config import Config

Fields = dict[str, Any]
Layers = Callable[[Config, int], list[str | None]]
"""From a config and the number of its decoder layers: 'moe', 'hash' or None (dense) for each."""

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2", "situ": "situ",
}  # fmt: skip
"""Name of an activation in a config -> ours."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The shared expert of a model type: as wide as an expert, but for what is named here."""

    count: str = ""
    """Key of how many widths of an expert it has; 0 or null: none."""
    width: str = ""
    """Key of its width; 0 or null: none."""
    each: str = ""
    """Key of the width that `count` multiplies, where it is not that of the experts."""
    gate: str = "none"
    combine: str = ""
    """Key of how it joins the routed output."""
    clamp: str = "none"
    """none, same (as the routed experts), or the key of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A model type: under which keys its files hold our fields, and what its code fixes."""

    model_types: tuple[str, ...]
    """Names of it in files; the first has the defaults."""
    family: str
    """Of `families.FAMILIES`."""
    router: Mapping[str, str]
    """Field of RouterSpec -> key."""
    fixed: Mapping[str, Any]
    """Field of RouterSpec -> the value that the code has, whatever the file says."""
    width: str = "moe_intermediate_size"
    dim: str = "hidden_size"
    depth: str = "num_hidden_layers"
    activation: str = "hidden_act"
    """Key of the activation; '': silu alone."""
    alpha: str = ""
    clamp: str = ""
    beta: str = ""
    """Key of beta of situ, and `linear_beta` of the other; read where the activation is situ."""
    linear_beta: str = ""
    latent: str = ""
    """Key of the width of what the routed experts see; null: that of a token."""
    latent_norm: str = ""
    """Key of whether that has a norm; then norm_eps is its eps."""
    norm_eps: str = "rms_norm_eps"
    experts: Mapping[str, Any] = field(default_factory=dict)
    """Field of ExpertSpec -> the value that the code has."""
    shared: Shared | None = None
    gate_bias: bool = False
    layers: Layers = None  # type: ignore[assignment]
    also: Mapping[str, str] = field(default_factory=dict)
    """Another name in published files -> key."""
    only: Mapping[str, tuple] = field(default_factory=dict)
    """Key -> the values that the code computes."""
    irrelevant: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ()
    prepare: Callable[[Fields], Fields] | None = None
    """What a file is before it is read: nested parts made flat, with dots in the names."""
    adjust: Callable[[Config, Fields, str], None] | None = None
    """What a row cannot say: changes the fields of the router, from the config and the kind of layer."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Key -> value where the file does not have it, of a model type that transformers has no class for."""
    cannot: Callable[[Config], str] | str = ""
    """Why no LayerSpec describes the layer; '': one does."""
    source: str = ""
    """Of a model type that transformers has no class for: where its code is."""

    @property
    def keys(self) -> set[str]:
        """Every key that the row reads, but those of its layers."""
        own = {*self.router.values(), self.width, self.dim, self.activation, self.alpha, self.clamp, *self.only}
        own |= {self.beta, self.linear_beta, self.latent, self.latent_norm}
        if self.shared is not None:
            own |= {self.shared.count, self.shared.width, self.shared.each, self.shared.combine, self.shared.clamp}
        return own - {"", "none", "same"}


# which layers are sparse


def everywhere(config: Config, depth: int) -> list[str | None]:
    """Every layer."""
    return ["moe"] * depth


def prefix(key: str, default: Any = None, *, every: str = "") -> Layers:
    """All but the first `key` layers; of those each `every`th, counted from layer 0."""

    def layers(config: Config, depth: int) -> list[str | None]:
        dense = config.whole(key, config.defaults.get(key, default), none=0)
        if every and isinstance(step := config.get(every, 1), list):
            return _by_flag(every, step, depth)
        each = config.whole(every, 1, none=1) if every else 1
        return ["moe" if i >= dense and i % (each or 1) == 0 else None for i in range(depth)]

    return layers


def types(otherwise: Layers, *, key: str = "mlp_layer_types", flags: str = "") -> Layers:
    """Those that a list of names calls sparse, else those of a list of flags, else the ones of `otherwise`."""

    def layers(config: Config, depth: int) -> list[str | None]:
        kinds = {"dense": None, "sparse": "moe", "moe": "moe", "hash_moe": "hash"}
        found = otherwise(config, depth)  # which reads its keys, so that they are no strangers
        if config.has(key):
            names = config.get(key)
            _length(key, names, depth)
            require(set(names) <= kinds.keys(), f"{key} has {sorted(set(names) - kinds.keys())}, not {sorted(kinds)}")
            return [kinds[name] for name in names[:depth]]
        if flags and isinstance(config.get(flags, None), list):
            return _by_flag(flags, config.get(flags), depth)
        return found

    return layers


def steps(config: Config, depth: int) -> list[str | None]:
    """Each decoder_sparse_step-th, but those of mlp_only_layers (qwen2_moe)."""
    step = config.whole("decoder_sparse_step", config.defaults.get("decoder_sparse_step", 1), low=1)
    dense = config.get("mlp_only_layers", config.defaults.get("mlp_only_layers", [])) or []
    whole = isinstance(dense, list) and all(isinstance(i, int) for i in dense)
    require(whole, f"mlp_only_layers is {dense!r}; it is a list of numbers of layers")
    outside = [i for i in dense if not 0 <= i < depth]
    require(not outside or depth == 0, f"mlp_only_layers has {outside}; there are {depth} layers")
    return ["moe" if i not in dense and (i + 1) % step == 0 else None for i in range(depth)]


def listed(key: str, otherwise: Layers) -> Layers:
    """Those whose numbers are listed, as a list or with commas between them."""

    def layers(config: Config, depth: int) -> list[str | None]:
        found = otherwise(config, depth)
        if not config.has(key):
            config.get(key, None)
            return found
        numbers = config.get(key)
        numbers = numbers.split(",") if isinstance(numbers, str) else numbers
        sparse = {int(each) for each in numbers if str(each).strip()}
        return ["moe" if i in sparse else None for i in range(depth)]

    return layers


def flagged(key: str, otherwise: Layers) -> Layers:
    """Those of a list of flags, one for each layer."""

    def layers(config: Config, depth: int) -> list[str | None]:
        found = otherwise(config, depth)
        return _by_flag(key, config.get(key), depth) if config.has(key) else found

    return layers


def _by_flag(key: str, flags: list, depth: int) -> list[str | None]:
    _length(key, flags, depth)
    return ["moe" if each else None for each in flags[:depth]]


def _length(key: str, values: Any, depth: int) -> None:
    require(isinstance(values, list), f"{key} is {values!r}; it is a list with an entry for each layer")
    # Some files list the layers that predict further tokens after the decoder layers.
    require(len(values) >= depth, f"{key} has {len(values)} entries; there are {depth} layers")
