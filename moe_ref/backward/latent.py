"""moe_ref, gradients: the latent backwards.

Legend: T tokens, D model dim, H latent dim.
"""

import numpy as np

from moe_ref.latent import LatentTrace, root_mean_square
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


def expand_backward(
    d_routed_TD: np.ndarray, trace: LatentTrace | None, params: LayerParams, spec: LayerSpec
) -> tuple[np.ndarray, dict]:
    """The gradients of the weighted sum of the experts, and of the parameters by name. [LAT-4]"""
    if trace is None or spec.latent is None or params.latent_w_up_HD is None:
        return d_routed_TD, {}
    d_normed_TH = d_routed_TD @ params.latent_w_up_HD.T
    grads = {"latent_w_up_HD": trace.normed_TH.T @ d_routed_TD}
    if spec.latent.norm_eps is None or params.latent_norm_H is None:
        return d_normed_TH, grads
    d_combined_TH, grads["latent_norm_H"] = rms_norm_backward(
        d_normed_TH, trace.combined_TH, params.latent_norm_H, spec.latent.norm_eps
    )
    return d_combined_TH, grads


def rms_norm_backward(
    d_normed: np.ndarray, rows: np.ndarray, scale: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of the rows and of the scale."""
    root = root_mean_square(rows, eps)
    unit = rows / root
    d_unit = d_normed * scale
    d_rows = (d_unit - unit * (d_unit * unit).mean(axis=-1, keepdims=True)) / root
    return d_rows, (d_normed * unit).sum(axis=0)


def compress_backward(d_input_TH: np.ndarray, x_TD: np.ndarray, params: LayerParams) -> tuple[np.ndarray, dict]:
    """The gradients of the tokens, and of the projection by name. [LAT-4]"""
    if params.latent_w_down_DH is None:
        return d_input_TH, {}
    return d_input_TH @ params.latent_w_down_DH.T, {"latent_w_down_DH": x_TD.T @ d_input_TH}
