"""conformance, the protocol: what a third party writes to have an implementation judged.

A subject is one class. The methods it defines are its capabilities; `route` is enough to start. NumPy goes in and
comes out; a framework lives inside the subject alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ref import LayerParams, LayerSpec, RouterSpec


class Unsupported(Exception):
    """Raised by a subject with a sentence that says why it cannot run a case. Never counts as a pass."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router returns. The two optional arrays let the judge find the stage of a fault sooner."""

    expert_ids_TK: np.ndarray
    """(T, K) integers; the order of the slots is free."""
    weights_TK: np.ndarray
    """(T, K) the weight of each slot."""
    scores_TE: np.ndarray | None = None
    """(T, E) scores without bias."""
    group_ids_TL: np.ndarray | None = None
    """(T, L) kept groups, in any order."""
    shared_weights_TS: np.ndarray | None = None
    """(T, S) weights of router-scored shared experts; needed where a spec has them."""


class Subject:
    """An implementation to be judged. Subclass it, define `route`, and point the suite at the class."""

    name: str = ""
    """Shown in reports; empty: the class name in lower case."""
    version: str = ""
    url: str = ""
    logit_dtypes: tuple[str, ...] = ("float32",)
    """dtypes in which `route` takes logits: float32, float64, bfloat16 (as ml_dtypes arrays)."""
    compute_dtype: str = "float32"
    """dtype in which it computes; the bounds of the comparison follow from it."""

    expert_dtype: str = "float32"
    """dtype of the experts' arithmetic, where it is narrower than compute_dtype (torchtitan: bfloat16)."""
    compiles: bool = False
    """Whether each new spec and number of tokens costs a compilation; then fewer sizes are tried."""

    def supports(self, spec: RouterSpec, layout=None) -> str | None:
        """None, or a sentence that says why this spec cannot be run."""
        return None

    def route(self, *arguments: Any, **inputs: Any) -> Routing:
        """Write it as route(self, logits_TE, spec, expert_bias_E): (T, num_logits) logits, a RouterSpec, (E,) or None.

        `inputs` are those of `moe_ref.route` that the spec needs.
        A parameter that this method does not name (learned_scale, token_ids_T and table_VK, given_ids_TK,
        token_mask_T, seed) makes the cases that need it unsupported.
        """
        raise NotImplementedError

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """Optional: the (T, E) logits of (T, D) tokens."""
        raise NotImplementedError

    def configure(self, fields: dict) -> None:
        """Optional: build the router for raw RouterSpec fields and run it once; an invalid set is an error."""
        raise NotImplementedError

    # whole layers; parameters are moe_ref.LayerParams, in the canonical [in, out] layout

    def supports_layer(self, spec: LayerSpec, layout=None) -> str | None:
        """None, or a sentence that says why this layer cannot be run; by default as for its router."""
        return self.supports(spec.router, layout)

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """Optional: (N,) flat slots t * K + k in the order of their experts, and (E,) rows of each expert."""
        raise NotImplementedError

    def experts(self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec):
        """Optional: (R, D) outputs for rows sorted by expert; rows past the sum of the counts belong to nobody."""
        raise NotImplementedError

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec):
        """Optional: (T, D) weighted sums of the expert outputs, given in the order that `permute` returns."""
        raise NotImplementedError

    def layer(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Any) -> np.ndarray:
        """Optional: (T, D) output of the whole layer. `inputs` are those of `moe_ref.moe_layer` that the case has."""
        raise NotImplementedError

    def layer_gradients(self, x_TD, params: LayerParams, spec: LayerSpec, d_output_TD, **inputs: Any) -> dict:
        """Optional: gradients of sum(output * d_output): 'x_TD', and each parameter that the layer has, by name."""
        raise NotImplementedError


METHODS = ("route", "gate", "configure", "permute", "experts", "combine", "layer", "layer_gradients")


def capabilities(subject: Subject) -> set[str]:
    """Names of the optional methods that the subject defines."""
    return {name for name in METHODS if getattr(type(subject), name) is not getattr(Subject, name)}
