"""conformance, layer: its case. Tokens, parameters, and the gradient that a loss sends back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from conformance.core.case import Case, float32, plain, rounder
from conformance.core.subject import Subject
from conformance.router.case import RouterCase, input_of_json
from moe_ref import AlignSpec, CapacitySpec, LayerParams, LayerSpec, RouterInputs, gate, layer_backward, moe_layer
from moe_ref.specs.inputs import BY_TOKEN
from moe_ref.specs.params import param_shapes

ROW_INPUTS = ("token_mask_T", *BY_TOKEN)
"""Inputs with one entry for each token."""
LENGTHS = ("sequence_lengths", "tokens_per_shard")
"""Inputs that cut the tokens into consecutive parts."""
PAST_THE_ROUTER = ("capacity", "align", *LENGTHS)
"""Inputs that the router does not get."""


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """A layer and the arrays that go with it, in float64; the subject is given them in float32, which holds them.

    `inputs`: further ones of moe_ref.moe_layer: token_mask_T, token_ids_T, table_VK, given_ids_TK, given_weights_TK,
    capacity, align, sequence_lengths, tokens_per_shard.
    """

    KEYS = frozenset({"spec", "x_TD", "params", "d_output_TD"})

    spec: LayerSpec
    x_TD: np.ndarray
    params: LayerParams
    d_output_TD: np.ndarray
    """What a loss sends back: the gradients are those of sum(output * d_output)."""

    @cached_property
    def reference(self):
        """The oracle's trace of this case."""
        return moe_layer(self.x_TD, self.params, self.spec, **RouterInputs.keywords(self.inputs))

    @cached_property
    def gradients(self):
        """The oracle's gradients of this case."""
        capacity = self.inputs.get("capacity")
        return layer_backward(self.reference, self.params, self.spec, self.d_output_TD, capacity=capacity)

    def part(self, kind: type[Case]) -> Case | None:
        """Its router besides."""
        return self.router_case if kind is RouterCase else super().part(kind)

    @cached_property
    def router_case(self) -> RouterCase:
        """The router of this layer alone, on its logits in float32."""
        inputs = {name: value for name, value in self.inputs.items() if name not in PAST_THE_ROUTER}
        if self.params.learned_scale is not None:
            inputs["learned_scale"] = self.params.learned_scale
        x_TD = np.where(self.valid_T[:, None], self.x_TD, 0)
        return RouterCase(
            spec=self.spec.router,
            logits_TE=float32(gate(x_TD, self.params.gate_ED, self.params.gate_bias_E)),
            expert_bias_E=self.params.expert_bias_E,
            inputs=inputs,
            seed=self.seed,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.x_TD)

    def with_params(self, **changes) -> Self:
        """A copy with other parameters."""
        return self.with_(params=replace(self.params, **changes))

    def tokens(self, rows) -> Self:
        """The case of some of its tokens, in the order given."""
        lengths = {name: self.inputs[name] for name in LENGTHS if name in self.inputs}
        if lengths:
            rows = np.sort(rows)  # a token stays in its sequence
        inputs = {name: value[rows] if name in ROW_INPUTS else value for name, value in self.inputs.items()}
        for name, own in lengths.items():
            part_of_T = np.repeat(np.arange(len(own)), own)
            inputs[name] = tuple(np.bincount(part_of_T[rows], minlength=len(own)).tolist())
        return self.with_(x_TD=self.x_TD[rows], d_output_TD=self.d_output_TD[rows], inputs=inputs)

    def simpler(self) -> Iterator[Self]:
        """Without a bias; rounder numbers."""
        if self.params.expert_bias_E is not None:
            yield self.with_params(expert_bias_E=None)
        for name in param_shapes(self.spec):
            value = getattr(self.params, name)
            if value is not None:
                if name.startswith("b_") and value.any():
                    yield self.with_params(**{name: np.zeros_like(value)})
                yield from (self.with_params(**{name: each}) for each in rounder(value))
        yield from (self.with_(x_TD=each) for each in rounder(self.x_TD))
        yield from (self.with_(d_output_TD=each) for each in rounder(self.d_output_TD))

    def why_not(self, subject: Subject, method: str) -> str | None:
        """By its spec, and by its capacity where it has one."""
        why = subject.supports_layer(self.spec)
        return why if why or "capacity" not in self.inputs else subject.supports_load(self.inputs["capacity"])

    def to_json(self) -> dict:
        """Plain data."""
        return {
            "spec": plain(self.spec.to_dict()),
            "x_TD": plain(self.x_TD),
            "params": {name: plain(value) for name, value in self.params.by_name().items()},
            "d_output_TD": plain(self.d_output_TD),
            "inputs": {name: plain(_as_data(value)) for name, value in self.inputs.items()},
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads what `to_json` wrote."""
        unknown = data.keys() - {f.name for f in fields(cls)}
        if unknown or not data.keys() >= cls.KEYS:
            raise ValueError(f"a layer case has the keys {sorted(f.name for f in fields(cls))}, not {sorted(data)}")
        spec = LayerSpec.from_dict(data["spec"])
        values: dict[str, Any] = {name: np.array(value, dtype=np.float64) for name, value in data["params"].items()}
        if wrong := values.keys() - {f.name for f in fields(LayerParams)}:
            raise ValueError(f"params has the unknown names {sorted(wrong)}")
        params = LayerParams(**values)
        params.check(spec)
        shape = (-1, spec.experts.dim)
        return cls(
            spec=spec,
            x_TD=np.array(data["x_TD"], dtype=np.float64).reshape(shape),
            params=params,
            d_output_TD=np.array(data["d_output_TD"], dtype=np.float64).reshape(shape),
            inputs={name: _input_of_json(name, value, spec) for name, value in data.get("inputs", {}).items()},
            seed=data.get("seed", 0),
        )


def _as_data(value: Any) -> Any:
    return value.to_dict() if isinstance(value, CapacitySpec | AlignSpec) else value


def _input_of_json(name: str, value: Any, spec: LayerSpec) -> Any:
    if name == "capacity":
        return CapacitySpec.from_dict(value)
    if name == "align":
        return AlignSpec.from_dict(value)
    return tuple(value) if name in LENGTHS else input_of_json(name, value, spec.router)


def _of_router(holds: Callable[[RouterCase], bool]) -> Callable[[LayerCase], bool]:
    return lambda case: holds(case.router_case)


LayerCase.TAGS = {name: _of_router(holds) for name, holds in RouterCase.TAGS.items()} | {
    "gated": lambda c: c.spec.experts.gated,
    "not_gated": lambda c: not c.spec.experts.gated,
    "expert_biases": lambda c: c.spec.experts.bias,
    "clamped": lambda c: c.spec.experts.clamp is not None,
    "alpha": lambda c: c.spec.experts.alpha != 1,
    "up_offset": lambda c: c.spec.experts.up_offset != 0,
    "silu": lambda c: c.spec.experts.activation == "silu",
    "situ": lambda c: c.spec.experts.activation == "situ",
    "gelu": lambda c: c.spec.experts.activation in ("gelu", "gelu_tanh"),
    "relu": lambda c: c.spec.experts.activation in ("relu", "relu2"),
    "square": lambda c: c.spec.experts.hidden_dim in (c.spec.routed_experts.dim, c.spec.routed_experts.dim / 2),
    "unaligned": lambda c: any(n % 4 for n in (c.spec.routed_experts.dim, c.spec.experts.hidden_dim)),
    "shared": lambda c: c.spec.shared is not None,
    "shared_gate": lambda c: c.spec.shared is not None and c.spec.shared.gate == "sigmoid",
    "averaged": lambda c: c.spec.shared is not None and c.spec.shared.combine == "average",
    "latent": lambda c: c.spec.latent is not None,
    "latent_norm": lambda c: c.spec.latent is not None and c.spec.latent.norm_eps is not None,
    "gate_bias": lambda c: c.spec.gate_bias,
    "weight_on_input": lambda c: c.spec.router.weight_on == "input",
    "capacity": lambda c: "capacity" in c.inputs,
    "aligned": lambda c: "align" in c.inputs,
    "given_weights": lambda c: "given_weights_TK" in c.inputs,
    "output_scaled": lambda c: c.spec.router.output_scale != 1,
    "idle_expert": lambda c: bool((c.reference.permutation.tokens_per_expert_E == 0).any()),
}
"""Those of its router, and its own."""
