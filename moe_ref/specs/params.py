"""moe_ref, the weights: the parameters of a layer in one canonical layout, and the layouts that checkpoints have.

The canonical layout is [in, out] with gate and up apart: x @ w. Layouts are named, never guessed from a shape,
since 2F == D and F == D are legal sizes.

Legend: E experts, S shared experts, D model dim, F expert hidden dim, H latent dim,
Z constant experts.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.specs.checks import array, one_of, require
from moe_ref.specs.layer import LayerSpec


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The weights of one expert, routed or shared; also their gradients, which have the same shapes."""

    w_up_DF: np.ndarray
    w_down_FD: np.ndarray
    w_gate_DF: np.ndarray | None = None
    """None where the expert is not gated."""
    b_up_F: np.ndarray | None = None
    b_down_D: np.ndarray | None = None
    b_gate_F: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class LayerParams:
    """The parameters of a layer, under the names they keep everywhere; None where the spec has none.

    The suffix E of `gate_ED` and `gate_bias_E` counts the columns of the logits (`RouterSpec.num_logits`), that of
    `expert_bias_E` and `learned_scale` the choices (`num_choices`), and that of the experts the experts
    (`num_experts`). They differ only where there are null experts or router-scored shared experts.
    """

    gate_ED: np.ndarray
    """(num_logits, D): one row per column of the logits."""
    gate_bias_E: np.ndarray | None = None
    """(num_logits,): learned, part of the logits."""
    expert_bias_E: np.ndarray | None = None
    """(num_choices,): for the choice only. None is zeros; selectors other than top_k and threshold take none."""
    learned_scale: np.ndarray | None = None
    """(num_choices,) per_expert, () global."""

    w_up_EDF: np.ndarray
    """D is the width of what the experts see: that of the latent, H, where there is one."""
    w_down_EFD: np.ndarray
    w_gate_EDF: np.ndarray | None = None
    """None where experts are not gated; then the activation applies to the up projection."""
    b_up_EF: np.ndarray | None = None
    b_down_ED: np.ndarray | None = None
    b_gate_EF: np.ndarray | None = None

    shared_w_up_SDF: np.ndarray | None = None
    """S is 1, or the number of router-scored shared experts; F is the width of a shared expert."""
    shared_w_down_SFD: np.ndarray | None = None
    shared_w_gate_SDF: np.ndarray | None = None
    shared_token_gate_D: np.ndarray | None = None
    """(D,): the logit of shared.gate 'sigmoid' is x @ shared_token_gate_D."""

    constant_w_ZD2: np.ndarray | None = None
    """Z constant experts, of the width of what the experts see: (a1, a2) = softmax(x @ constant_w_D2)."""
    constant_ZD: np.ndarray | None = None
    """v of each constant expert."""

    latent_w_down_DH: np.ndarray | None = None
    """What the routed experts see is x @ latent_w_down_DH."""
    latent_w_up_HD: np.ndarray | None = None
    latent_norm_H: np.ndarray | None = None
    """The learned scale of the norm before latent_w_up_HD."""

    @classmethod
    def init(cls, spec: LayerSpec, seed: int = 0) -> "LayerParams":
        """Random float64 parameters for a spec: matrices have variance 1 / fan-in, scales are in [0.5, 1.5)."""
        rng = np.random.default_rng(seed)
        values: dict = {}
        for name, shape in param_shapes(spec).items():
            if shape is None:
                values[name] = None
            elif name in ("learned_scale", "latent_norm_H"):
                values[name] = rng.uniform(0.5, 1.5, shape)
            elif name in ("gate_ED", "shared_token_gate_D"):
                values[name] = rng.standard_normal(shape) / np.sqrt(spec.experts.dim)
            elif "w_" in name:
                values[name] = rng.standard_normal(shape) / np.sqrt(shape[-2])
            elif name == "constant_ZD":
                values[name] = rng.standard_normal(shape)
            else:
                values[name] = 0.1 * rng.standard_normal(shape)
        return cls(**values)

    def check(self, spec: LayerSpec) -> None:
        """Each parameter is there exactly when the spec has it, with its shape."""
        for name, shape in param_shapes(spec).items():
            value = getattr(self, name)
            if name == "expert_bias_E" and value is None:
                continue
            require(shape is not None or value is None, f"{name} is given, but the spec has none")
            if shape is not None:
                require(value is not None, f"{name} is None; the spec needs an array of shape {shape}")
                array(name, value, shape)

    def by_name(self) -> dict[str, Any]:
        """Field -> value, of the parameters that there are, in the order of the fields."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def astype(self, dtype: DTypeLike) -> "LayerParams":
        """The same parameters in another dtype."""
        return LayerParams(**{name: np.asarray(value).astype(dtype) for name, value in self.by_name().items()})

    def expert(self, expert_id: int) -> FeedForward:
        """The weights of one routed expert."""
        return FeedForward(
            w_up_DF=self.w_up_EDF[expert_id],
            w_down_FD=self.w_down_EFD[expert_id],
            w_gate_DF=_row(self.w_gate_EDF, expert_id),
            b_up_F=_row(self.b_up_EF, expert_id),
            b_down_D=_row(self.b_down_ED, expert_id),
            b_gate_F=_row(self.b_gate_EF, expert_id),
        )

    def shared_expert(self, shared_id: int) -> FeedForward:
        """The weights of one shared expert."""
        assert self.shared_w_up_SDF is not None
        assert self.shared_w_down_SFD is not None
        return FeedForward(
            w_up_DF=self.shared_w_up_SDF[shared_id],
            w_down_FD=self.shared_w_down_SFD[shared_id],
            w_gate_DF=_row(self.shared_w_gate_SDF, shared_id),
        )


def param_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...] | None]:
    """The shape of every field of LayerParams, None where the spec has no such parameter."""
    router, experts, shared = spec.router, spec.experts, spec.shared
    E, D, F, S = router.num_experts, experts.dim, experts.hidden_dim, spec.num_shared_experts
    H = spec.routed_experts.dim
    shared_F = 0 if shared is None else shared.hidden_dim
    scale_shapes: dict[str, tuple[int, ...] | None] = {"per_expert": (router.num_choices,), "global": (), "none": None}
    shapes: dict[str, tuple[int, ...] | None] = {field.name: None for field in fields(LayerParams)}
    shapes |= {
        "gate_ED": (router.num_logits, D),
        "gate_bias_E": (router.num_logits,) if spec.gate_bias else None,
        "expert_bias_E": (router.num_choices,) if router.takes_bias else None,
        "learned_scale": scale_shapes[router.learned_scale],
        "w_up_EDF": (E, H, F),
        "w_down_EFD": (E, F, H),
        "w_gate_EDF": (E, H, F) if experts.gated else None,
    }
    if experts.bias:
        shapes |= {"b_up_EF": (E, F), "b_down_ED": (E, H), "b_gate_EF": (E, F) if experts.gated else None}
    if shared is not None:
        shapes |= {
            "shared_w_up_SDF": (S, D, shared_F),
            "shared_w_down_SFD": (S, shared_F, D),
            "shared_w_gate_SDF": (S, D, shared_F) if experts.gated else None,
            "shared_token_gate_D": (D,) if shared.gate == "sigmoid" else None,
        }
    if router.num_constant_experts:
        Z = router.num_constant_experts
        shapes |= {"constant_w_ZD2": (Z, H, 2), "constant_ZD": (Z, H)}
    if spec.latent is not None:
        shapes |= {
            "latent_w_down_DH": (D, H),
            "latent_w_up_HD": (H, D),
            "latent_norm_H": None if spec.latent.norm_eps is None else (H,),
        }
    return shapes


def _row(values, index: int):
    return None if values is None else values[index]


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """How a checkpoint stores the projections of its experts.

    Raises:
        ValueError: a field is not one of its names.
    """

    fused: str = "separate"
    """separate: gate and up are two tensors; halves: one, gate columns then up columns (qwen3_moe); interleaved:
    one, columns g0, u0, g1, u1, ... (gpt_oss). Not-gated experts have nothing to fuse: separate."""
    order: str = "in_out"
    """Last two axes: in_out, x @ w (gpt_oss, llama4); out_in, x @ w.T (torch.nn.Linear, most of transformers)."""

    def __post_init__(self):
        one_of("fused", self.fused, ("separate", "halves", "interleaved"))
        one_of("order", self.order, ("in_out", "out_in"))

    def to_canonical(self, gate_up: Any, w_down: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """(w_gate, w_up, w_down) in the canonical layout.

        Args:
            gate_up: a pair (w_gate or None, w_up) where separate, else one fused tensor.
            w_down: the down projection.
        """
        if self.fused == "separate":
            w_gate, w_up = gate_up
            return None if w_gate is None else self._turn(w_gate), self._turn(w_up), self._turn(w_down)
        fused = self._turn(gate_up)
        _even("gate_up", fused)
        return *_parts(fused, self.fused), self._turn(w_down)

    def from_canonical(self, w_gate: np.ndarray | None, w_up: np.ndarray, w_down: np.ndarray) -> tuple[Any, np.ndarray]:
        """(gate_up, w_down) in this layout; gate_up is a pair where separate, else one fused tensor."""
        if self.fused == "separate":
            return (None if w_gate is None else self._turn(w_gate), self._turn(w_up)), self._turn(w_down)
        require(w_gate is not None, f"w_gate is None, but fused is {self.fused!r}; only gated experts are fused")
        return self._turn(_joined(w_gate, w_up, self.fused)), self._turn(w_down)

    def bias_to_canonical(self, gate_up_bias: Any) -> tuple[np.ndarray | None, np.ndarray]:
        """(b_gate, b_up) from a pair where separate, else from one fused tensor; `order` does not concern a bias."""
        if self.fused == "separate":
            return gate_up_bias
        _even("gate_up_bias", gate_up_bias)
        return _parts(gate_up_bias, self.fused)

    def bias_from_canonical(self, b_gate: np.ndarray | None, b_up: np.ndarray) -> Any:
        """The pair (b_gate, b_up) where separate, else one fused tensor."""
        if self.fused == "separate":
            return b_gate, b_up
        require(b_gate is not None, f"b_gate is None, but fused is {self.fused!r}; only gated experts are fused")
        return _joined(b_gate, b_up, self.fused)

    def _turn(self, w):
        """Between this order and in_out; it is its own inverse."""
        return np.swapaxes(w, -1, -2) if self.order == "out_in" else np.asarray(w)


def _parts(fused, how: str):
    """Gate and up part of the last axis."""
    if how == "interleaved":
        return fused[..., 0::2], fused[..., 1::2]
    F = fused.shape[-1] // 2
    return fused[..., :F], fused[..., F:]


def _joined(gate_part, up_part, how: str):
    """The inverse of `_parts`."""
    if how == "interleaved":
        return np.stack([gate_part, up_part], axis=-1).reshape(*up_part.shape[:-1], -1)
    return np.concatenate([gate_part, up_part], axis=-1)


def _even(field: str, fused) -> None:
    size = fused.shape[-1]
    require(size % 2 == 0, f"{field} has {size} output columns; gate and up make an even number")
