"""moe_ref, the spec of a layer: its router, its experts, and the experts that every token has beside them.

A spec says *what* a layer computes, never how. Each field past the first few defaults to the identity, so a spec
lists only what a model has.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from moe_ref.specs.base import Spec, first_difference
from moe_ref.specs.checks import integer, number, one_of, require
from moe_ref.specs.readers import hf, maxtext, megatron, torchtitan
from moe_ref.specs.readers.config import Config
from moe_ref.specs.router import RouterSpec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "situ")


@dataclass(frozen=True, kw_only=True)
class ExpertSpec(Spec):
    """What one expert computes: down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated.

    The activation's input is called the gate half; without a gate it is the up projection. The shared experts of a
    layer compute the same, with a width and a clamp of their own (`LayerSpec.shared_experts`).

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    dim: int
    """Width of a token, D. A latent width of the routed experts is `LayerSpec.latent`'s."""
    hidden_dim: int
    """Width inside an expert, F."""
    gated: bool = True
    """Two projections in, gate and up; False: up alone (nemotron_h)."""
    activation: str = "silu"
    """silu, gelu (exact, with erf), gelu_tanh, relu, relu2, the square of relu, or situ."""
    alpha: float = 1.0
    """alpha in z * sigmoid(alpha * z); only with silu (gpt-oss: 1.702)."""
    beta: float = 1.0
    """beta in beta * tanh(z / beta) * sigmoid(z); only with situ (Kimi-K3 technical report, eq. 12: 4)."""
    linear_beta: float | None = None
    """The up half is this * tanh(up / this), after its clamp; None: as it is; only with situ (Kimi-K3: 25)."""
    up_offset: float = 0.0
    """Added to the up half, after its clamp (gpt-oss: 1)."""
    clamp: float | None = None
    """The gate half is at most this, the up half at most this in size; None: no clamp."""
    clamp_at: str = "before"
    """Whether the gate half is clamped before the activation (gpt-oss) or after it (step3p7)."""
    bias: bool = False
    """All projections have a bias (gpt-oss)."""

    def __post_init__(self):
        super().__post_init__()
        integer("dim", self.dim, 1)
        integer("hidden_dim", self.hidden_dim, 1)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("clamp_at", self.clamp_at, ("before", "after"))
        for field in ("gated", "bias"):
            require(isinstance(getattr(self, field), bool), f"{field} is {getattr(self, field)!r}; it is a bool")
        number("alpha", self.alpha, above=0.0)
        number("up_offset", self.up_offset)
        if self.clamp is not None:
            number("clamp", self.clamp, above=0.0)
        require(
            self.alpha == 1.0 or self.activation == "silu",
            f"alpha is {self.alpha!r} with activation {self.activation!r}; only 'silu' has one",
        )
        number("beta", self.beta, above=0.0)
        require(
            self.beta == 1.0 or self.activation == "situ",
            f"beta is {self.beta!r} with activation {self.activation!r}; only 'situ' has one",
        )
        if self.linear_beta is not None:
            number("linear_beta", self.linear_beta, above=0.0)
            require(
                self.activation == "situ" and self.gated,
                f"linear_beta is {self.linear_beta!r}; only 'situ' with a gate has one",
            )
        require(self.up_offset == 0.0 or self.gated, f"up_offset is {self.up_offset!r}; without a gate it is 0.0")
        require(
            self.clamp_at == "before" or self.clamp is not None,
            f"clamp_at is {self.clamp_at!r}, but clamp is None",
        )


@dataclass(frozen=True, kw_only=True)
class SharedSpec(Spec):
    """Experts that see every token and whose output joins the routed output.

    There is one, of any width, or as many as the router scores (`RouterSpec.num_scored_shared_experts`).
    They have the form of the routed experts, but no bias, and no clamp unless it is given here.
    """

    hidden_dim: int
    """Width inside a shared expert."""
    gate: str = "none"
    """none, or sigmoid: its output is multiplied by the sigmoid of one logit per token (qwen2_moe)."""
    combine: str = "sum"
    """sum: routed + shared; average: (routed + shared) / 2 (cohere2_moe)."""
    clamp: float | None = None
    """As in ExpertSpec, at the same place; models that clamp both say it twice (hy_v4 clamps the routed alone)."""

    def __post_init__(self):
        super().__post_init__()
        integer("hidden_dim", self.hidden_dim, 1)
        one_of("gate", self.gate, ("none", "sigmoid"))
        one_of("combine", self.combine, ("sum", "average"))
        if self.clamp is not None:
            number("clamp", self.clamp, above=0.0)


@dataclass(frozen=True, kw_only=True)
class LatentSpec(Spec):
    """A width of the routed experts' own: a projection of the token before them, and one of their weighted sum after.

    up(norm(sum of weight * expert(down(x)))). The router and the shared experts see the token itself. Null experts and
    a weight on the input are of what the experts see (Nemotron-3: `moe_latent_size`; Kimi-K3 technical report, eq. 11).
    """

    dim: int
    """Width H of what the routed experts see and return."""
    norm_eps: float | None = None
    """The weighted sum, times output_scale, is divided by sqrt(mean of its squares + this) and multiplied by a learned
    scale before it is projected up (Kimi-K3: `latent_moe_use_norm`); None: no norm."""

    def __post_init__(self):
        super().__post_init__()
        integer("dim", self.dim, 1)
        if self.norm_eps is not None:
            number("norm_eps", self.norm_eps, above=0.0)


@dataclass(frozen=True, kw_only=True)
class LayerSpec(Spec):
    """One Mixture-of-Experts layer: a router, its experts, and what stands beside them."""

    router: RouterSpec
    experts: ExpertSpec
    shared: SharedSpec | None = None
    """None: no shared expert."""
    gate_bias: bool = False
    """The gate has a learned bias, part of the logits (gpt-oss)."""
    latent: LatentSpec | None = None
    """None: the routed experts see the token."""

    def __post_init__(self):
        super().__post_init__()
        for field, kind in (("router", RouterSpec), ("experts", ExpertSpec), ("gate_bias", bool)):
            value = getattr(self, field)
            require(isinstance(value, kind), f"{field} is {value!r}; it is a {kind.__name__}")
        require(
            self.shared is None or isinstance(self.shared, SharedSpec),
            f"shared is {self.shared!r}; it is a SharedSpec or None",
        )
        require(
            self.latent is None or isinstance(self.latent, LatentSpec),
            f"latent is {self.latent!r}; it is a LatentSpec or None",
        )
        scored = self.router.num_scored_shared_experts
        if scored:
            require(self.shared is not None, f"shared is None, but router.num_scored_shared_experts is {scored}")
        if scored and self.shared is not None:
            # Their factor is the router's weight; a second one has no public model.
            require(
                self.shared.gate == "none",
                f"shared.gate is {self.shared.gate!r}, but the router scores the {scored} shared experts",
            )

    @property
    def num_shared_experts(self) -> int:
        """S: the router-scored shared experts, else 1 where there is a shared expert, else 0."""
        return 0 if self.shared is None else max(1, self.router.num_scored_shared_experts)

    @property
    def routed_experts(self) -> ExpertSpec:
        """What a routed expert computes: `experts`, in the latent width where there is one."""
        return self.experts if self.latent is None else self.experts.replace(dim=self.latent.dim)

    @property
    def shared_experts(self) -> ExpertSpec | None:
        """What a shared expert computes; None where there is none."""
        if self.shared is None:
            return None
        # clamp_at means nothing without a clamp, and is then the default.
        clamp_at = "before" if self.shared.clamp is None else self.experts.clamp_at
        return self.experts.replace(
            hidden_dim=self.shared.hidden_dim, clamp=self.shared.clamp, clamp_at=clamp_at, bias=False
        )

    @classmethod
    def from_dict(cls, values: dict) -> "LayerSpec":
        """A spec from nested dicts, or from a published config, which has a `model_type`; errors as `from_hf`."""
        if "model_type" in values:
            return cls.from_hf(values)
        parts = {"router": RouterSpec, "experts": ExpertSpec, "shared": SharedSpec, "latent": LatentSpec}
        given = {name: value for name, value in values.items() if name not in parts or value is not None}
        return super().from_dict(
            {name: parts[name].from_dict(value) if name in parts else value for name, value in given.items()}
        )

    def to_dict(self) -> dict:
        """Nested dicts of the fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        found = super().to_dict() | {"router": self.router.to_dict(), "experts": self.experts.to_dict()}
        further = {"shared": self.shared, "latent": self.latent}
        return found | {name: part.to_dict() for name, part in further.items() if part is not None}

    @classmethod
    def from_hf(cls, config: Any, *, ignore: Iterable[str] = ()) -> Self:
        """The layer of a config of huggingface: of all its MoE layers, which are the same.

        Args:
            config: a dict, the path of a config.json or of its folder, or a config object of transformers.
            ignore: keys that the reader does not know, and that do not concern the MoE layers.

        Raises:
            ValueError: it is no config of a known model with experts; a key is unknown, or two contradict each other;
                its layers differ (`layers_from_hf`); no LayerSpec describes them (`RouterSpec.from_hf`).
        """
        found = [(i, layer) for i, layer in enumerate(cls.layers_from_hf(config, ignore=ignore)) if layer is not None]
        first, layer = found[0]
        for other, there in found:
            require(
                there == layer,
                f"MoE layers {first} and {other} differ ({first_difference(layer, there)}); "
                "LayerSpec.layers_from_hf(config) has one for each decoder layer",
            )
        return layer

    @classmethod
    def layers_from_hf(cls, config: Any, *, ignore: Iterable[str] = ()) -> list[Self | None]:
        """One layer for each decoder layer of a config of huggingface; None where it is dense. Errors as `from_hf`."""
        reading = hf.read(config, ignore=ignore)
        return [
            None if kind is None else _layer(cls, reading.layer(i), reading.config)
            for i, kind in enumerate(reading.kinds)
        ]

    @classmethod
    def from_maxtext(cls, config: Any, *, ignore: Iterable[str] = ()) -> Self:
        """The MoE layer of a config of MaxText: a pyconfig object, a dict, or the path of a flat yml. See `from_hf`."""
        return _layer(cls, *maxtext.read(config, ignore=ignore))

    @classmethod
    def from_torchtitan(cls, config: Any, *, ignore: Iterable[str] = ()) -> Self:
        """The MoE layer of a config of torchtitan: an MoE.Config, what holds one, a dict, or a file. See `from_hf`."""
        return _layer(cls, *torchtitan.read(config, ignore=ignore))

    @classmethod
    def from_megatron(cls, config: Any, *, ignore: Iterable[str] = ()) -> Self:
        """The MoE layer of a config of Megatron-Core: a TransformerConfig, its arguments, or a file. See `from_hf`."""
        return _layer(cls, *megatron.read(config, ignore=ignore))


def _layer(cls, fields: dict[str, Any], config: Config):
    """One layer of a config; an error speaks of the user's keys."""
    parts: dict[str, Any] = {"router": RouterSpec, "experts": ExpertSpec, "shared": SharedSpec, "latent": LatentSpec}
    try:
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in fields.items()})
    except ValueError as error:
        raise ValueError(f"{config.renamed(str(error))}, in {config.what}") from error
