"""conformance, the case of a layer: tokens, parameters and an output gradient, with an id, tags, and a JSON form.

It has the interface of `Case`, so that a failure shrinks, is shown, replays and is declared in the same way.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from conformance.router.case import TAGS, Case
from conformance.router.case import _array as array_of_input
from conformance.router.case import _plain as plain
from moe_ref import LayerParams, LayerSpec, RouterInputs, gate, layer_backward, moe_layer
from moe_ref.specs.inputs import BY_TOKEN

ROW_INPUTS = ("token_mask_T", *BY_TOKEN)
"""Inputs with one entry for each token."""


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A layer and the arrays that go with it, in float64; the subject is given them in float32, which holds them."""

    spec: LayerSpec
    x_TD: np.ndarray
    params: LayerParams
    d_output_TD: np.ndarray
    """What a loss sends back: the gradients are those of sum(output * d_output)."""
    inputs: dict = field(default_factory=dict)
    """Further inputs of moe_ref.moe_layer: token_mask_T, token_ids_T, table_VK, given_ids_TK."""
    seed: int = 0
    """Of the draws that a requirement makes: permutations, counts, poison."""
    dtype: str = "float32"

    @cached_property
    def reference(self):
        """The oracle's trace of this case."""
        return moe_layer(self.x_TD, self.params, self.spec, **RouterInputs.keywords(self.inputs))

    @cached_property
    def gradients(self):
        """The oracle's gradients of this case."""
        return layer_backward(self.reference, self.params, self.spec, self.d_output_TD)

    @cached_property
    def router_case(self) -> Case:
        """The router of this layer alone, on its logits in float32."""
        inputs = dict(self.inputs)
        if self.params.learned_scale is not None:
            inputs["learned_scale"] = self.params.learned_scale
        x_TD = np.where(self.valid_T[:, None], self.x_TD, 0)
        logits_TE = gate(x_TD, self.params.gate_ED, self.params.gate_bias_E).astype(np.float32).astype(np.float64)
        bias_E = self.params.expert_bias_E
        return Case(spec=self.spec.router, logits_TE=logits_TE, expert_bias_E=bias_E, inputs=inputs, seed=self.seed)

    @cached_property
    def tags(self) -> frozenset[str]:
        """What is special about this case, of its router too."""
        own = {tag for tag, holds in LAYER_TAGS.items() if holds(self)}
        return frozenset(own | {tag for tag, holds in TAGS.items() if holds(self.router_case)})

    @property
    def num_tokens(self) -> int:
        return len(self.x_TD)

    @property
    def valid_T(self) -> np.ndarray:
        """(T,) which tokens are not padding."""
        return self.inputs.get("token_mask_T", np.ones(self.num_tokens, dtype=bool))

    def rng(self) -> np.random.Generator:
        """The source of a requirement's draws."""
        return np.random.default_rng(self.seed)

    def with_(self, **changes) -> Self:
        """A copy with other values."""
        return replace(self, **changes)

    def with_params(self, **changes) -> Self:
        """A copy with other parameters."""
        return replace(self, params=replace(self.params, **changes))

    def tokens(self, rows) -> Self:
        """The case of some of its tokens, in the order given."""
        inputs = {name: value[rows] if name in ROW_INPUTS else value for name, value in self.inputs.items()}
        return self.with_(x_TD=self.x_TD[rows], d_output_TD=self.d_output_TD[rows], inputs=inputs)

    def to_json(self) -> dict:
        """Plain data; -inf and NaN are strings, so that any JSON reader takes it."""
        params = {f.name: getattr(self.params, f.name) for f in fields(self.params)}
        return {
            "spec": _plain_tree(self.spec.to_dict()),
            "x_TD": plain(self.x_TD),
            "params": {name: plain(value) for name, value in params.items() if value is not None},
            "d_output_TD": plain(self.d_output_TD),
            "inputs": {name: plain(value) for name, value in self.inputs.items()},
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: dict) -> "LayerCase":
        """Reads what `to_json` wrote; an unknown or missing key is a ValueError."""
        unknown = data.keys() - {f.name for f in fields(cls)}
        if unknown or not {"spec", "x_TD", "params", "d_output_TD"} <= data.keys():
            raise ValueError(f"a layer case has the keys {sorted(f.name for f in fields(cls))}, not {sorted(data)}")
        spec = LayerSpec.from_dict(data["spec"])
        values: dict = {name: np.array(value, dtype=np.float64) for name, value in data["params"].items()}
        wrong = values.keys() - {f.name for f in fields(LayerParams)}
        if wrong:
            raise ValueError(f"params has the unknown names {sorted(wrong)}")
        params = LayerParams(**values)
        params.check(spec)
        shape = (-1, spec.experts.dim)
        return cls(
            spec=spec,
            x_TD=np.array(data["x_TD"], dtype=np.float64).reshape(shape),
            params=params,
            d_output_TD=np.array(data["d_output_TD"], dtype=np.float64).reshape(shape),
            inputs={name: array_of_input(name, value) for name, value in data.get("inputs", {}).items()},
            seed=data.get("seed", 0),
        )

    @cached_property
    def digest(self) -> str:
        """Six hex digits that name the case."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:6]


def case_from_json(data: dict) -> Any:
    """A case of any kind: that of a layer has tokens, and that of a layout has a layout besides."""
    if "load_spec" in data:
        from conformance.balance.case import LoadCase

        return LoadCase.from_json(data)
    if "layout" in data:
        from conformance.sharded.case import LayoutCase

        return LayoutCase.from_json(data)
    return LayerCase.from_json(data) if "x_TD" in data else Case.from_json(data)


def _plain_tree(values: dict) -> dict:
    return {name: _plain_tree(value) if isinstance(value, dict) else plain(value) for name, value in values.items()}


LAYER_TAGS = {
    "gated": lambda c: c.spec.experts.gated,
    "not_gated": lambda c: not c.spec.experts.gated,
    "expert_biases": lambda c: c.spec.experts.bias,
    "clamped": lambda c: c.spec.experts.clamp is not None,
    "alpha": lambda c: c.spec.experts.alpha != 1,
    "up_offset": lambda c: c.spec.experts.up_offset != 0,
    "silu": lambda c: c.spec.experts.activation == "silu",
    "gelu": lambda c: c.spec.experts.activation in ("gelu", "gelu_tanh"),
    "relu": lambda c: c.spec.experts.activation in ("relu", "relu2"),
    "square": lambda c: c.spec.experts.hidden_dim in (c.spec.experts.dim, c.spec.experts.dim / 2),
    "shared": lambda c: c.spec.shared is not None,
    "shared_gate": lambda c: c.spec.shared is not None and c.spec.shared.gate == "sigmoid",
    "averaged": lambda c: c.spec.shared is not None and c.spec.shared.combine == "average",
    "gate_bias": lambda c: c.spec.gate_bias,
    "weight_on_input": lambda c: c.spec.router.weight_on == "input",
    "output_scaled": lambda c: c.spec.router.output_scale != 1,
    "idle_expert": lambda c: bool((c.reference.permutation.tokens_per_expert_E == 0).any()),
}
"""name -> whether a case of a layer has it, besides what its router has."""
