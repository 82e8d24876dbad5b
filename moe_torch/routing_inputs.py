"""moe_torch, inputs of routing: what is wrong with shapes and dtypes is said here, before anything is computed."""

import torch
from torch import Tensor

from moe_ref import RouterSpec


def check_inputs(
    logits_TE,
    spec: RouterSpec,
    expert_bias_E,
    learned_scale,
    token_ids_T,
    table_VK,
    given_ids_TK,
    given_weights_TK,
    mask_T,
) -> None:
    """The inputs have the shapes and kinds that the spec asks for, and none is given that it does not read."""
    expect("logits_TE", logits_TE, (None, spec.num_logits), "float")
    T, E, K = len(logits_TE), spec.num_choices, spec.top_k
    scale_shape = {"none": None, "per_expert": (E,), "global": ()}[spec.learned_scale]
    # (field, value, the shape it has where the spec reads it, kind)
    for field, value, shape, kind in (
        ("learned_scale", learned_scale, scale_shape, "float"),
        ("token_ids_T", token_ids_T, (T,) if spec.selector == "table" else None, "int"),
        ("table_VK", table_VK, (None, K) if spec.selector == "table" else None, "int"),
        ("given_ids_TK", given_ids_TK, (T, K) if spec.selector == "given" else None, "int"),
    ):
        if (value is None) != (shape is None):
            raise ValueError(f"{field} is {'None' if value is None else 'given'}; the spec has learned_scale "
                             f"{spec.learned_scale!r} and selector {spec.selector!r}")  # fmt: skip
        if shape is not None:
            expect(field, value, shape, kind)
    if given_weights_TK is not None:
        if spec.selector != "given":
            raise ValueError(f"given_weights_TK is given, but selector {spec.selector!r} takes none")
        expect("given_weights_TK", given_weights_TK, (T, K), "float")
    if expert_bias_E is not None:
        # Elsewhere nothing is ranked, so a bias would be silently ignored.
        if spec.selector != "top_k":
            raise ValueError(f"expert_bias_E is given, but selector {spec.selector!r} takes none")
        expect("expert_bias_E", expert_bias_E, (E,), "float")
    if mask_T is not None:
        expect("token_mask_T", mask_T, (T,), "bool")


def expect(field: str, value: Tensor, shape: tuple[int | None, ...], kind: str) -> None:
    """The value has the shape (None matches any length) and kind (float, int, bool)."""
    dtype = value.dtype
    found = "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"
    if found != kind:
        raise ValueError(f"{field} has dtype {dtype}; it is {kind}")
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{field} has shape {tuple(value.shape)}; it is ({wanted})")
