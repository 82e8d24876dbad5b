"""moe_ref, checkpoints of huggingface: the weights of one layer as LayerParams, and back.

Which naming a file has is read from its names, how each name is stored from the family: never from a shape.
"""

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np

from moe_ref.specs.checks import nearest, one_of, require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.readers import hf
from moe_ref.specs.readers.hf_forms import FORMS, Form, Projections
from moe_ref.specs.readers.tensors import Tensors, numbers

NAMES = ("modules", "file")
"""The naming of transformers' own modules, and that of published files."""


def params_from_hf(state_dict: Mapping[str, Any] | str | PathLike, config: Any, *, layer: int,
    ignore: Iterable[str] = ()
                   ) -> LayerParams:  # fmt: skip
    """The weights of one decoder layer of a checkpoint.

    Args:
        state_dict: name -> tensor, of a whole model, a part of it, or the MoE block alone; or the path of a
            .safetensors file, of its index, or of their folder, of which only this layer is read.
        config: as `LayerSpec.from_hf` takes it.
        layer: the decoder layer.
        ignore: keys of the config, as in `LayerSpec.from_hf`.

    Returns:
        Parameters in the dtype of the file, bfloat16 as float32, which holds it exactly.

    Raises:
        ValueError: the layer is dense or is not in it; a name is missing,
        or one of the layer is unknown; a shape is not
            that of the config.
    """
    spec, forms, _ = _of(config, layer, ignore)
    tensors = Tensors(state_dict) if isinstance(state_dict, (str, PathLike)) else state_dict
    root, form = _found(tensors, forms, layer, spec)
    own = _Names(tensors, root, form, spec)
    values: dict[str, Any] = {"gate_ED": own.get(form.gate)}
    if spec.gate_bias:
        values["gate_bias_E"] = own.get(form.gate_bias)
    if form.expert_bias and spec.router.takes_bias:
        bias = own.get(form.expert_bias, optional=form.bias_is_optional)
        values["expert_bias_E"] = None if bias is None else bias.reshape(-1)
    elif form.expert_bias and own.has(form.expert_bias):
        own.get(form.expert_bias)  # a table chooses, and reads no bias
    if spec.router.learned_scale != "none":
        values["learned_scale"] = own.get(form.learned_scale).reshape(
            () if spec.router.learned_scale == "global" else (-1,)
        )
    values |= _experts(own, form.experts, spec)
    values |= _latent(own, form, spec)
    if spec.shared is not None:
        require(form.shared is not None, f"the config has a shared expert, but no name of one is known: {form.gate}")
        assert form.shared is not None
        values |= _shared(own, form.shared, spec)
    if spec.shared is not None and spec.shared.gate == "sigmoid":
        values["shared_token_gate_D"] = own.get(form.token_gate)[0]
    own.finish()
    params = LayerParams(**values)
    try:
        params.check(spec)
    except ValueError as error:
        raise ValueError(f"{error}, of the config; read from {root}{form.experts.down} and its like") from error
    return params


def params_to_hf(params: LayerParams, config: Any, *, layer: int, names: str = "modules", root: str | None = None,
                 ignore: Iterable[str] = ()) -> dict[str, np.ndarray]:  # fmt: skip
    """The tensors of a layer under the names of a checkpoint; the inverse of `params_from_hf`.

    Args:
        params: of the layer.
        config: as `LayerSpec.from_hf` takes it.
        layer: the decoder layer.
        names: modules (those of transformers 5.24) or file (those of published files).
        root: what stands before the names of a layer; without it model.layers.N. and '' for a block alone.
        ignore: keys of the config.

    Raises:
        ValueError: the parameters are not of this layer.
    """
    one_of("names", names, NAMES)
    spec, forms, _ = _of(config, layer, ignore)
    params.check(spec)
    form = forms[0 if names == "modules" else -1]
    found: dict[str, Any] = {form.gate: params.gate_ED}
    optional = {form.gate_bias: params.gate_bias_E, form.expert_bias: params.expert_bias_E}
    if params.learned_scale is not None:
        optional[form.learned_scale] = np.asarray(params.learned_scale).reshape(-1)
    if params.shared_token_gate_D is not None:
        optional[form.token_gate] = params.shared_token_gate_D[None]
    if params.expert_bias_E is not None and "moe_statics" in form.expert_bias:
        optional[form.expert_bias] = params.expert_bias_E[None]
    found |= {name: value for name, value in optional.items() if value is not None and name}
    found |= _back(form.experts, params.w_gate_EDF, params.w_up_EDF, params.w_down_EFD, spec, params)
    latent = (_turned(params.latent_w_down_DH), _turned(params.latent_w_up_HD), params.latent_norm_H)
    found |= {name: value for name, value in zip(form.latent, latent, strict=False) if value is not None}
    if spec.shared is not None and form.shared is not None:
        assert params.shared_w_up_SDF is not None
        assert params.shared_w_down_SFD is not None
        parts = _back(
            form.shared, params.shared_w_gate_SDF, params.shared_w_up_SDF, params.shared_w_down_SFD, spec, None
        )
        stacked = spec.router.num_scored_shared_experts
        found |= parts if stacked else {name: value[0] for name, value in parts.items()}
    root = f"model.layers.{layer}." if root is None else root
    return {f"{root}{name}": np.ascontiguousarray(value) for name, value in found.items()}


def _of(config: Any, layer: int, ignore: Iterable[str]) -> tuple[LayerSpec, tuple[Form, ...], str]:
    reading = hf.read(config, ignore=ignore)
    layers = LayerSpec.layers_from_hf(config, ignore=ignore)
    require(0 <= layer < len(layers), f"layer is {layer}; {reading.config.what} has {len(layers)} layers")
    spec = layers[layer]
    require(spec is not None, f"layer {layer} is dense; the first MoE layer is {reading.sparse[0]}")
    assert spec is not None
    family = reading.row.family
    require(family in FORMS, f"the weights of {family} have no known names; those of {', '.join(sorted(FORMS))} have")
    return spec, FORMS[family], family


class _Names:
    """The tensors of one layer, and which of them were read."""

    def __init__(self, tensors: Mapping[str, Any], root: str, form: Form, spec: LayerSpec) -> None:
        self.tensors, self.root, self.form = tensors, root, form
        prefixes = tuple(f"{root}{each}" for each in form.prefixes) if root or not _is_block(tensors, form) else ("",)
        self.is_block = prefixes == ("",)
        self.own = {name for name in tensors if name.startswith(prefixes)}
        self.read: set[str] = set()
        skipped = {self.full(name) for name in form.ignored}
        null = range(spec.router.num_experts, spec.router.num_choices)  # some files have weights for these, unread
        skipped |= {self.full(name.format(e=e)) for name in form.experts.names if "{e}" in name for e in null}
        self.own -= skipped

    def full(self, name: str) -> str:
        return name.partition(".")[2] if self.is_block else f"{self.root}{name}"

    def has(self, name: str) -> bool:
        return self.full(name) in self.tensors

    def get(self, name: str, *, optional: bool = False) -> Any:
        full = self.full(name)
        if optional and full not in self.tensors:
            return None
        require(full in self.tensors, f"{full} is missing{nearest(full, self.own) if self.own else ''}")
        self.read.add(full)
        return numbers(full, self.tensors[full])

    def finish(self) -> None:
        unknown = sorted(self.own - self.read)
        scaled = any(word in name for name in unknown for word in ("scale", "packed", "_blocks", "qweight"))
        hint = "; the weights are quantised, dequantise them first" if scaled else ""
        require(not unknown, f"{', '.join(unknown[:5])} is no weight of this layer that is known{hint}")


def _is_block(tensors: Mapping[str, Any], form: Form) -> bool:
    return form.gate.partition(".")[2] in tensors


def _found(tensors: Mapping[str, Any], forms: tuple[Form, ...], layer: int, spec: LayerSpec) -> tuple[str, Form]:
    """What stands before the names of the layer, and the form that they have."""
    candidates = []
    for form in forms:
        if _is_block(tensors, form):
            candidates.append(("", form))
        ending = re.compile(rf"^((?:.*\.)?(?:layers|blocks|h)\.{layer}\.){re.escape(form.gate)}$")
        candidates += [(match[1], form) for name in tensors if (match := ending.match(name))]
    gates = " or ".join(dict.fromkeys(form.gate for form in forms))
    require(bool(candidates), f"no name ends in layers.{layer}.{gates}: layer {layer} is not in these weights")
    roots = sorted({root for root, _ in candidates})
    require(len(roots) == 1, f"the router of layer {layer} is there {len(roots)} times, below {', '.join(roots)}")
    root = roots[0]

    def missing(form: Form) -> int:
        own = _Names(tensors, root, form, spec)
        names = [*form.experts.names, form.expert_bias, *(form.shared.names if form.shared and spec.shared else ())]
        return sum(not own.has(name.format(e=0)) for name in names if name)

    return root, min((form for _, form in candidates), key=missing)


# experts


def _experts(own: _Names, place: Projections, spec: LayerSpec) -> dict[str, Any]:
    E = spec.router.num_experts
    w_gate, w_up, w_down = _projections(own, place, spec, E, spec.experts.hidden_dim)
    found: dict[str, Any] = {"w_up_EDF": w_up, "w_down_EFD": w_down} | (
        {} if w_gate is None else {"w_gate_EDF": w_gate}
    )
    if place.biases and spec.experts.bias:
        b_gate, b_up = place.layout.bias_to_canonical(own.get(place.biases[0]))
        found |= {"b_up_EF": b_up, "b_down_ED": own.get(place.biases[1]), "b_gate_EF": b_gate}
    return found


def _latent(own: _Names, form: Form, spec: LayerSpec) -> dict[str, np.ndarray]:
    if spec.latent is None:
        return {}
    fields = ("latent_w_down_DH", "latent_w_up_HD", "latent_norm_H")
    wanted = fields[: 2 if spec.latent.norm_eps is None else 3]
    require(
        len(form.latent) >= len(wanted), f"the config has a latent, but no name of its weights is known: {form.gate}"
    )
    values = (own.get(name) for name in form.latent[: len(wanted)])
    return {field: _turned(value) for field, value in zip(wanted, values, strict=True)}


def _turned(w: Any) -> Any:
    """Between [in, out] and [out, in]; a norm has one axis, and there may be none."""
    return w if w is None or np.ndim(w) < 2 else np.swapaxes(w, 0, 1)


def _shared(own: _Names, place: Projections, spec: LayerSpec) -> dict[str, np.ndarray]:
    assert spec.shared is not None
    stacked = bool(spec.router.num_scored_shared_experts)
    w_gate, w_up, w_down = _projections(own, place, spec, spec.num_shared_experts, spec.shared.hidden_dim, stacked)
    found = {"shared_w_up_SDF": w_up, "shared_w_down_SFD": w_down}
    return found if w_gate is None else found | {"shared_w_gate_SDF": w_gate}


def _projections(own: _Names, place: Projections, spec: LayerSpec, E: int, F: int, stacked: bool = True
                 ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:  # fmt: skip
    """(w_gate, w_up, w_down), canonical, with an axis for the experts."""

    def read(name: str) -> np.ndarray:
        if "{e}" in name:
            return np.stack([own.get(name.format(e=e)) for e in range(E)])
        value = own.get(name)
        if place.is_flat:
            require(value.shape[0] % E == 0, f"{name} has {value.shape[0]} rows, which {E} experts do not divide")
            return value.reshape(E, -1, value.shape[-1])
        return value if stacked else value[None]

    parts = [read(name) for name in place.gate_up]
    down = read(place.down)
    if place.unused_rows:
        parts = [part[:E] for part in parts]
    order = place.down_order or place.layout.order
    gate_up: Any = (
        parts[0] if place.layout.fused != "separate" else ((None, *parts) if len(parts) == 1 else tuple(parts))
    )
    w_gate, w_up, _ = place.layout.to_canonical(gate_up, parts[0])
    return w_gate, w_up, np.swapaxes(down, -1, -2) if order == "out_in" else down


def _back(place: Projections, w_gate: Any, w_up: np.ndarray, w_down: np.ndarray, spec: LayerSpec,
          params: LayerParams | None) -> dict[str, np.ndarray]:  # fmt: skip
    """Name -> tensor, from the canonical layout."""
    gate_up, _ = place.layout.from_canonical(w_gate, w_up, w_down)
    order = place.down_order or place.layout.order
    down = np.swapaxes(w_down, -1, -2) if order == "out_in" else w_down
    parts = [gate_up] if place.layout.fused != "separate" else [part for part in gate_up if part is not None]
    if place.unused_rows:
        zeros = np.zeros((spec.router.num_null_experts, *parts[0].shape[1:]), parts[0].dtype)
        parts = [np.concatenate([part, zeros]) for part in parts]
    found = {}
    for name, value in zip((*place.gate_up, place.down), (*parts, down), strict=True):
        if "{e}" in name:
            found |= {name.format(e=e): value[e] for e in range(len(value))}
        else:
            found[name] = value.reshape(-1, value.shape[-1]) if place.is_flat else value
    if params is not None and place.biases and params.b_up_EF is not None:
        found[place.biases[0]] = place.layout.bias_from_canonical(params.b_gate_EF, params.b_up_EF)
        found[place.biases[1]] = params.b_down_ED
    return found
