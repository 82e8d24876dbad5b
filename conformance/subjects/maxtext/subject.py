"""conformance, subject maxtext: router, MoE layer and load of AI-Hypercomputer/maxtext, as they are."""

from importlib.metadata import version
from typing import ClassVar, Unpack

import numpy as np

from conformance.core.inputs import LayerInputs
from conformance.core.subject import Subject
from conformance.subjects.maxtext.balance import MaxtextBalance
from conformance.subjects.maxtext.layer import MaxtextLayer
from conformance.subjects.maxtext.module import FLOAT32
from conformance.subjects.maxtext.router import MaxtextRouter
from moe_ref import LayerParams, LayerSpec, ShardLayout


class Maxtext(MaxtextRouter, MaxtextLayer, MaxtextBalance):
    """maxtext on one device in float32; its experts are `jax.lax.ragged_dot`, which is what a CPU has."""

    name = "maxtext"
    version = version("maxtext")
    compiles = True


class MaxtextDense(Maxtext):
    """The same with `dense_matmul`, which computes every expert for every token."""

    name = "maxtext-dense"
    entries: ClassVar = FLOAT32 | {"sparse_matmul": False}


class MaxtextBfloat16(MaxtextRouter, MaxtextLayer):
    """Router and layer in the dtypes of its defaults: parameters in float32, and all arithmetic in bfloat16."""

    name = "maxtext-bfloat16"
    version = Maxtext.version
    compiles = True
    logit_dtypes = ("bfloat16",)
    compute_dtype = expert_dtype = "bfloat16"
    entries: ClassVar = {}


class MaxtextInference(Subject):
    """`dense_matmul` as a decoder calls it to serve: with a capacity its masks are other ones than in training."""

    name = "maxtext-inference"
    version = Maxtext.version
    compiles = True

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        if spec.experts.bias or spec.router.weight_on == "input":
            return "maxtext's config refuses a capacity of gpt_oss and llama4, and without one serving is as training"
        return SERVING.supports_layer(spec, layout)

    def layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> np.ndarray:
        return SERVING.layer(x_TD, params, spec, **inputs)


class _Serving(MaxtextLayer):
    entries: ClassVar = MaxtextDense.entries | {"model_call_mode": "inference"}


SERVING = _Serving()
