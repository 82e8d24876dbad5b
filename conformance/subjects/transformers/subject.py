"""conformance, subject transformers: routers, MoE blocks and losses of huggingface/transformers, as they are."""

from importlib.metadata import version

import numpy as np
import torch

from conformance.core.subject import Routing, Subject
from conformance.subjects.transformers.balance import TransformersBalance
from conformance.subjects.transformers.families import ROUTERS
from conformance.subjects.transformers.layer import GROUPED_MM, IMPLEMENTATIONS, TransformersLayer
from conformance.subjects.transformers.router import TransformersRouter, find
from moe_ref import RouterSpec, ShardLayout
from moe_ref.specs.checks import nearest


class Transformers(TransformersRouter, TransformersLayer, TransformersBalance):
    """The classes and functions of transformers that compute a spec; with `family`, only that family's."""

    name = "transformers"
    logit_dtypes = ("float32", "bfloat16")
    families = tuple(ROUTERS)
    """Names of `--family` that have a class of their own here."""

    def __init__(self, family: str = "", experts_implementation: str = ""):
        family = family or self.family
        if family and family not in ROUTERS:
            raise ValueError(f"family is {family!r}{nearest(family, ROUTERS)}")
        self.family = family
        self.experts_implementation = experts_implementation or self.experts_implementation
        if self.experts_implementation not in ("", *IMPLEMENTATIONS):
            raise ValueError(
                f"experts_implementation is {experts_implementation!r}; it is one of {', '.join(IMPLEMENTATIONS)}"
            )
        self.version = version("transformers")
        torch.set_num_threads(1)  # a router call is too small to share


class TransformersGroupedMm(TransformersLayer):
    """The blocks alone, with experts on grouped matmuls, which is what a model uses unless it is told otherwise."""

    name = "transformers-grouped-mm"
    experts_implementation = GROUPED_MM

    def __init__(self):
        self.version = version("transformers")
        torch.set_num_threads(1)  # as above


class TransformersAxk2(Subject):
    """The router of A.X-K2 as what it is a copy of, DeepSeek-V3: `families.py` has what it computes instead."""

    name = "transformers-axk2"

    def __init__(self):
        self.real = Transformers("axk2")
        self.version = self.real.version

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        why = find(spec, "deepseek_v3", False)[1] or self.real.supports(as_axk2(spec), layout)
        return why or None

    def route(self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None) -> Routing:
        return self.real.route(logits_TE, as_axk2(spec), expert_bias_E)


def as_axk2(spec: RouterSpec) -> RouterSpec:
    """The spec that its row has under these settings."""
    return spec if spec.num_expert_groups is None else spec.replace(mask_fill=0.0)
