"""moe_torch, kernels: the router as a custom operator, with fake and autograd formulas.

Legend: T tokens, E choices, K top_k, L groups kept.
"""

from typing import Any

import torch
from torch import Tensor

from moe_ref.specs.router import RouterSpec
from moe_torch.kernels.device import on_its_device


def arguments_of(spec: RouterSpec) -> tuple:
    """A spec that `choice.unfit` has nothing against, as arguments of the operator."""
    return (
        spec.num_choices, spec.top_k, spec.num_expert_groups or 0, spec.num_limited_groups or 0, spec.group_score_k,
        spec.score_func, spec.score_over == "selected", spec.select_by == "logit",
        spec.route_norm, spec.norm_form == "clamp", float(spec.norm_eps), float(spec.route_scale),
        float(spec.logit_scale),
    )  # fmt: skip


@torch.library.custom_op("moe_torch::route_tokens", mutates_args=())
@on_its_device
def route_tokens(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_mask_T: Tensor | None,
    num_choices: int,
    top_k: int,
    groups: int,
    kept: int,
    group_score_k: int,
    score_func: str,
    selected: bool,
    by_logit: bool,
    norm: bool,
    norm_clamp: bool,
    norm_eps: float,
    scale: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in float32, expert ids and, with groups, the kept groups of each token, best first.

    Args:
        groups, kept: 0 without groups.
        selected, by_logit, norm_clamp: score_over is 'selected', select_by 'logit', norm_form 'clamp'.
    """
    T, E, K, L = len(logits_TE), num_choices, top_k, kept if groups else 0
    weights_TK, ids_TK, groups_TL = _empty(logits_TE, K, L)
    if T == 0:
        return weights_TK, ids_TK, groups_TL
    from moe_torch.kernels.router import route_kernel

    G = max(groups, 1)
    P = E // G
    GROUPS, EACH = _power_of_two(G), _power_of_two(P)
    tokens = _tokens_of(GROUPS * EACH, logits_TE)
    logits_TE = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    route_kernel[(-(-T // tokens),)](
        logits_TE, bias_E, token_mask_T, ids_TK, weights_TK, groups_TL if groups else None, T, logits_TE.stride(0),
        norm_eps, scale,
        G=G, P=P, L=L, K=K, GROUPS=GROUPS, EACH=EACH, KEPT=_power_of_two(max(L, 1)), SLOTS=_power_of_two(K),
        TOKENS=tokens, FUNC=score_func, SELECTED=selected, BY_LOGIT=by_logit, GROUP_SCORE_K=group_score_k,
        NORM=norm, NORM_CLAMP=norm_clamp, LOGIT_SCALE=logit_scale,
        **_options(GROUPS * EACH),
    )  # fmt: skip
    return weights_TK, ids_TK, groups_TL


@route_tokens.register_fake
def _(logits_TE, bias_E, token_mask_T, num_choices, top_k, groups, kept, *rest):
    return _empty(logits_TE, top_k, kept if groups else 0)


@torch.library.custom_op("moe_torch::route_tokens_backward", mutates_args=())
@on_its_device
def route_tokens_backward(
    d_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    score_func: str,
    selected: bool,
    norm: bool,
    norm_clamp: bool,
    norm_eps: float,
    scale: float,
    logit_scale: float,
) -> Tensor:
    """The gradient of the logits, in their dtype; 0 for a token that is padding."""
    (T, E), K = logits_TE.shape, ids_TK.shape[1]
    d_logits_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    if T == 0:
        return d_logits_TE
    from moe_torch.kernels.router import route_backward_kernel

    columns = _power_of_two(E)
    tokens = _tokens_of(columns, logits_TE)
    logits_TE = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    route_backward_kernel[(-(-T // tokens),)](
        d_weights_TK.contiguous(), logits_TE, ids_TK, d_logits_TE, T, logits_TE.stride(0), E, norm_eps, scale,
        K=K, COLUMNS=columns, SLOTS=_power_of_two(K), TOKENS=tokens, FUNC=score_func, SELECTED=selected,
        NORM=norm, NORM_CLAMP=norm_clamp, LOGIT_SCALE=logit_scale, **_options(columns),
    )  # fmt: skip
    return d_logits_TE


@route_tokens_backward.register_fake
def _(d_weights_TK, logits_TE, *rest):
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _empty(logits_TE: Tensor, K: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    T = len(logits_TE)
    weights_TK = logits_TE.new_empty(T, K, dtype=torch.float32)
    return weights_TK, logits_TE.new_empty(T, K, dtype=torch.int64), logits_TE.new_empty(T, L, dtype=torch.int64)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _tokens_of(columns: int, logits_TE: Tensor) -> int:
    """Tokens of a program: some, so that their dependent steps overlap, but few enough for the registers."""
    if logits_TE.device.type == "cpu" and len(logits_TE) > 256:
        return 1024  # in the interpreter each program costs milliseconds
    return max(1, min(16, 1024 // columns))


def _options(columns: int) -> dict[str, Any]:
    # A warp that has whole rows needs no shared memory to find the best of one.
    return {"num_warps": 1 if columns <= 512 else 2, "enable_fp_fusion": True}


def _keep_for_backward(ctx, inputs, output) -> None:
    logits_TE, *_ = inputs
    ctx.how = (inputs[8], inputs[9], *inputs[11:])
    ctx.save_for_backward(logits_TE, output[1])


def _gradients(ctx, d_weights_TK, _ids, _groups):
    logits_TE, ids_TK = ctx.saved_tensors
    return route_tokens_backward(d_weights_TK, logits_TE, ids_TK, *ctx.how), *(None,) * 15


route_tokens.register_autograd(_gradients, setup_context=_keep_for_backward)
