"""Tests, cases of the kernels of the experts: small sizes that no tile divides, and what moe_ref says of them.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, R = T * K rows and slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_ref.backward.layer import feed_forward_backward
from moe_ref.experts import feed_forward
from moe_ref.specs.layer import ExpertSpec
from moe_ref.specs.params import FeedForward
from moe_torch.activation import Activation
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.kernels import interpreted
from moe_torch.kernels.expert_ops import expert_tiles

# Relative to the whole array: some ten roundings of half a unit, which average out; a tail that is read, a row that is
# missed or of another expert is off by tenths, or NaN.
BOUND = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
NAMES = ("w1", "w2", "w3", "b1", "b2", "b3")

EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt_oss": {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.7, "bias": True},
    "kimi_k3": {"activation": "situ", "beta": 0.7, "linear_beta": 0.5},
    "step3p7": {"clamp": 0.2, "clamp_at": "after"},
    "nemotron_h": {"gated": False, "activation": "relu2", "bias": True, "clamp": 0.5},
    "gelu": {"activation": "gelu", "bias": True},
    "gelu_tanh": {"activation": "gelu_tanh", "gated": False},
    "relu": {"activation": "relu"},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the operator, and the gradient of its result."""

    spec: ExpertSpec
    x_TD: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor | None
    weights: tuple[Tensor | None, ...]
    d_out_TD: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        w1_EFD = self.weights[0]
        assert w1_EFD is not None
        return len(w1_EFD)


def case(
    T: int = 13,
    D: int = 19,
    F: int = 21,
    E: int = 4,
    K: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    form: str = "plain",
    weighted: bool = True,
    unused: float = 0.2,
    empty: int | None = 1,
    seed: int = 0,
) -> Case:
    """A case of these sizes; a share of slots is of nobody, and an expert may be empty.

    A token without any expert holds NaN, and so does its gradient: nothing may read either.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = ExpertSpec(dim=D, hidden_dim=F, **EXPERTS[form])

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    ids_TK = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    ids_TK[torch.rand(T, K, generator=generator) < unused] = -1
    if empty is not None:
        ids_TK[ids_TK == empty % E] = -1
    weights = (
        normal(E, F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5),
        normal(E, F, D, scale=D**-0.5) if spec.gated else None, normal(E, F) if spec.bias else None,
        normal(E, D) if spec.bias else None, normal(E, F) if spec.bias and spec.gated else None,
    )  # fmt: skip
    x_TD, d_out_TD = normal(T, D), normal(T, D)
    for values in (x_TD, d_out_TD):
        values[(ids_TK < 0).all(1)] = torch.nan
    weights_TK = torch.rand(T, K, generator=generator) + 0.1 if weighted else None
    return Case(
        spec=spec, x_TD=x_TD, expert_ids_TK=ids_TK, weights_TK=weights_TK, weights=weights, d_out_TD=d_out_TD
    )  # fmt: skip


def run(c: Case, operator: Any = expert_tiles) -> dict[str, Tensor]:
    """The result and every gradient by name, of kernels in the interpreter."""
    leaves = {"x": c.x_TD, "weights": c.weights_TK, **dict(zip(NAMES, c.weights, strict=True))}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items() if value is not None}
    K = c.expert_ids_TK.shape[1]
    permutation = LocalTokenDispatcher(c.num_experts).permute(c.expert_ids_TK)
    with np.errstate(over="ignore", invalid="ignore"), interpreted():
        out_TD, *_ = operator(
            leaves["x"], permutation.order_N, permutation.tokens_per_expert_E, leaves.get("weights"), K,
            *(leaves.get(name) for name in NAMES), *Activation.of(c.spec), True,
        )  # fmt: skip
        grads = torch.autograd.grad(out_TD, list(leaves.values()), c.d_out_TD)
    return {"out": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}


def expected(c: Case) -> dict[str, np.ndarray]:
    """What moe_ref computes in float64 from the same numbers."""
    x_TD, d_out_TD = (np.nan_to_num(v.double().numpy()) for v in (c.x_TD, c.d_out_TD))
    T, K = c.expert_ids_TK.shape
    weights_TK = np.ones((T, K)) if c.weights_TK is None else c.weights_TK.double().numpy()
    found = {"out": np.zeros_like(x_TD), "x": np.zeros_like(x_TD), "weights": np.zeros((T, K))}
    found |= {name: np.zeros(w.shape) for name, w in zip(NAMES, c.weights, strict=True) if w is not None}
    for e in range(c.num_experts):
        t, k = np.nonzero(c.expert_ids_TK.numpy() == e)
        w1, w2, w3, b1, b2, b3 = (None if w is None else w[e].double().numpy().T for w in c.weights)
        gate = (w1, b1) if w3 is not None else (None, None)
        own = FeedForward(
            w_gate_DF=gate[0], b_gate_F=gate[1], w_up_DF=w1 if w3 is None else w3, b_up_F=b1 if w3 is None else b3,
            w_down_FD=w2, b_down_D=b2,
        )  # fmt: skip
        trace, weight_R1 = feed_forward(x_TD[t], own, c.spec), weights_TK[t, k][:, None]
        np.add.at(found["out"], t, weight_R1 * trace.output_RD)
        found["weights"][t, k] = (d_out_TD[t] * trace.output_RD).sum(1)
        d_x_RD, grads = feed_forward_backward(weight_R1 * d_out_TD[t], trace, own, c.spec)
        np.add.at(found["x"], t, d_x_RD)
        first = ("up", "gate")[c.spec.gated]
        for name, field in (
            ("w1", f"w_{first}_DF"), ("w2", "w_down_FD"), ("w3", "w_up_DF"),
            ("b1", f"b_{first}_F"), ("b2", "b_down_D"), ("b3", "b_up_F"),
        ):  # fmt: skip
            if name in found:
                found[name][e] = getattr(grads, field).T
    if c.weights_TK is None:
        del found["weights"]
    return found


def errors(c: Case, found: dict[str, Tensor]) -> dict[str, float]:
    """The error of each array relative to its size; NaN is infinitely wrong, and so is anything in place of 0."""
    wanted = expected(c)
    assert found.keys() == wanted.keys()
    sizes = {}
    for name, right in wanted.items():
        off = float(np.linalg.norm(found[name].double().numpy() - right))
        size = float(np.linalg.norm(right))
        sizes[name] = 0.0 if off == 0 else off / size if size and np.isfinite(off) else np.inf
    return sizes


def assert_right(c: Case) -> None:
    """Result and gradients are those of moe_ref."""
    found = errors(c, run(c))
    wrong = {name: error for name, error in found.items() if error > BOUND[c.x_TD.dtype]}
    assert not wrong, wrong


def is_caught(c: Case) -> bool:
    """Whether `assert_right` would fail on it; an error of the interpreter counts too."""
    try:
        return any(error > BOUND[c.x_TD.dtype] for error in errors(c, run(c)).values())
    except Exception:
        return True
