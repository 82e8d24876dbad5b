"""conformance, the protocol: what a third party writes to have an implementation judged.

A subject is one class. The methods it defines are its capabilities; `route` is enough to start. NumPy goes in and
comes out; a framework lives inside the subject alone.
"""

from dataclasses import dataclass

import numpy as np

from moe_ref import RouterSpec


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

    def supports(self, spec: RouterSpec, layout=None) -> str | None:
        """None, or a sentence that says why this spec cannot be run."""
        return None

    def route(self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs) -> Routing:
        """Route (T, num_logits) logits. `inputs` are those of `moe_ref.route` that the spec needs.

        A parameter that this method does not name (learned_scale, token_ids_T and table_VK, given_ids_TK,
        token_mask_T, seed) makes the cases that need it unsupported.
        """
        raise NotImplementedError

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """Optional: the (T, E) logits of (T, D) tokens."""
        raise NotImplementedError

    def configure(self, fields: dict) -> None:
        """Optional: build the router for raw RouterSpec fields, valid or not; an invalid set is a ValueError."""
        raise NotImplementedError


def capabilities(subject: Subject) -> set[str]:
    """Names of the optional methods that the subject defines."""
    methods = ("route", "gate", "configure")
    return {name for name in methods if getattr(type(subject), name) is not getattr(Subject, name)}
