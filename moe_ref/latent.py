"""moe_ref, the latent: a width of the routed experts' own, before and after them.

Router and shared experts never see it. Padding and unused slots are 0 in it, as they are in a token.

Legend: T tokens, D model dim, H latent dim.
"""

from dataclasses import dataclass

import numpy as np

from moe_ref.experts import project
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


@dataclass(frozen=True, kw_only=True)
class LatentTrace:
    """Every intermediate around the experts; without a latent all are of the token's own width."""

    input_TH: np.ndarray
    """What the experts see of each token."""
    combined_TH: np.ndarray
    """The weighted sum of its slots, times output_scale."""
    normed_TH: np.ndarray
    """The same without a norm."""
    routed_TD: np.ndarray


def compress(x_TD: np.ndarray, params: LayerParams) -> np.ndarray:
    """What the experts see is a projection of the token, or the token. [LAT-1]"""
    return x_TD if params.latent_w_down_DH is None else project(x_TD, params.latent_w_down_DH)


def expand(input_TH: np.ndarray, combined_TH: np.ndarray, params: LayerParams, spec: LayerSpec) -> LatentTrace:
    """The weighted sum of the experts is normed, where there is a norm, and projected up, once. [LAT-1, LAT-3]"""
    normed_TH, routed_TD = combined_TH, combined_TH
    eps = None if spec.latent is None else spec.latent.norm_eps
    if eps is not None and params.latent_norm_H is not None:
        normed_TH = rms_norm(combined_TH, params.latent_norm_H, eps)
    if params.latent_w_up_HD is not None:
        routed_TD = project(normed_TH, params.latent_w_up_HD)
    return LatentTrace(input_TH=input_TH, combined_TH=combined_TH, normed_TH=normed_TH, routed_TD=routed_TD)


def rms_norm(rows: np.ndarray, scale: np.ndarray | np.floating, eps: float) -> np.ndarray:
    """A row over the root of the mean of its squares, with eps inside the root, times the scale. [LAT-3]"""
    return rows / root_mean_square(rows, eps) * scale


def root_mean_square(rows: np.ndarray, eps: float) -> np.ndarray:
    """sqrt(mean of the squares + eps) of each row."""
    return np.sqrt((rows**2).mean(axis=-1, keepdims=True) + np.asarray(eps, rows.dtype))
