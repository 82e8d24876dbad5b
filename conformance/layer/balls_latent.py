"""conformance, layer: balls of the latent, around those of the experts.

Legend: T tokens, D model dim, H latent dim.
"""

from dataclasses import dataclass

import numpy as np

from conformance.layer.balls import LIBRARY, Ball, exact
from moe_ref import LayerParams, LayerSpec


@dataclass(frozen=True, kw_only=True)
class LatentBall:
    """The balls of the weighted sum of the experts on its way back to a token."""

    combined_TH: Ball
    inverse_T1: Ball | None
    """Of the root of the mean of its squares; None without a norm."""
    normed_TH: Ball


def compress(x_TD: Ball, params: LayerParams) -> Ball:
    """The bounds of `moe_ref.latent.compress`."""
    return x_TD if params.latent_w_down_DH is None else x_TD @ exact(params.latent_w_down_DH, x_TD.dtype)


def expand(combined_TH: Ball, params: LayerParams, spec: LayerSpec) -> tuple[LatentBall | None, Ball]:
    """The bounds of `moe_ref.latent.expand`: what a gradient needs of it, and the routed output."""
    if spec.latent is None:
        return None, combined_TH
    inverse_T1, normed_TH, eps = None, combined_TH, spec.latent.norm_eps
    if eps is not None:
        inverse_T1 = _inverse_root(combined_TH, eps)
        normed_TH = combined_TH * inverse_T1 * exact(params.latent_norm_H, combined_TH.dtype)[None]
    routed_TD = normed_TH @ exact(params.latent_w_up_HD, combined_TH.dtype)
    return LatentBall(combined_TH=combined_TH, inverse_T1=inverse_T1, normed_TH=normed_TH), routed_TD


def _inverse_root(rows: Ball, eps: float) -> Ball:
    """1 / sqrt(mean of the squares + eps), which no rounding takes past 1 / sqrt(eps)."""
    mean_T1 = (rows * rows).sum(-1)[:, None].times(1 / rows.centre.shape[-1])
    size_T1 = mean_T1.centre + eps
    least_T1 = np.maximum(size_T1 - mean_T1.radius - mean_T1.unit * size_T1, eps / 2)
    inverse_T1 = 1 / np.sqrt(size_T1)
    return rows.made(inverse_T1, 1 / np.sqrt(least_T1) - inverse_T1 + LIBRARY * rows.unit * inverse_T1)


def expand_backward(d_routed_TD: Ball, trace: LatentBall | None, params: LayerParams) -> tuple[Ball, dict[str, Ball]]:
    """The bounds of `moe_ref.backward.latent.expand_backward`."""
    if trace is None:
        return d_routed_TD, {}
    dtype = d_routed_TD.dtype
    d_normed_TH = d_routed_TD @ exact(params.latent_w_up_HD, dtype).T
    grads = {"latent_w_up_HD": trace.normed_TH.T @ d_routed_TD}
    if trace.inverse_T1 is None:
        return d_normed_TH, grads
    unit_TH = trace.combined_TH * trace.inverse_T1
    d_unit_TH = d_normed_TH * exact(params.latent_norm_H, dtype)[None]
    along_T1 = (d_unit_TH * unit_TH).sum(-1)[:, None].times(1 / unit_TH.centre.shape[-1])
    d_combined_TH = (d_unit_TH + (unit_TH * along_T1).times(-1)) * trace.inverse_T1
    return d_combined_TH, grads | {"latent_norm_H": (d_normed_TH * unit_TH).sum(0)}


def compress_backward(d_input_TH: Ball, x_TD: Ball, params: LayerParams) -> tuple[Ball, dict[str, Ball]]:
    """The bounds of `moe_ref.backward.latent.compress_backward`."""
    if params.latent_w_down_DH is None:
        return d_input_TH, {}
    d_x_TD = d_input_TH @ exact(params.latent_w_down_DH, d_input_TH.dtype).T
    return d_x_TD, {"latent_w_down_DH": x_TD.T @ d_input_TH}
