"""conformance, subject maxtext: router, MoE layer and load of AI-Hypercomputer/maxtext, as they are."""

from importlib.metadata import version
from typing import ClassVar, Unpack

import numpy as np

from conformance.core.inputs import LayerInputs, RouteInputs
from conformance.core.subject import Routing, Subject
from conformance.subjects.maxtext.balance import MaxtextBalance
from conformance.subjects.maxtext.layer import MaxtextLayer
from conformance.subjects.maxtext.module import FLOAT32
from conformance.subjects.maxtext.router import DEEPSEEK3, MaxtextRouter
from conformance.subjects.maxtext.settings import block_of
from moe_ref import LayerParams, LayerSpec, RouterSpec, ShardLayout


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


class MaxtextDeepseekCustom(Subject):
    """The router under the name of a published config, deepseek-custom.yml, whose entries are those of DeepSeek-V3."""

    name = "maxtext-deepseek-custom"
    version = Maxtext.version
    compiles = True

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        if block_of(spec, expert_bias=True) is not DEEPSEEK3 or spec.selector != "top_k" or spec.num_expert_groups:
            return "deepseek-custom is DeepSeek-V3 without groups"
        return NAMED.supports(spec, layout)

    def route(
        self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs: Unpack[RouteInputs]
    ) -> Routing:
        return NAMED.route(logits_TE, spec, expert_bias_E, **inputs)


class _Named(MaxtextRouter):
    entries: ClassVar = FLOAT32 | {"model_name": "deepseek-custom"}


NAMED = _Named()
