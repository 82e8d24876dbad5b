"""conformance, subject maxtext: router, MoE layer and load of AI-Hypercomputer/maxtext, as they are."""

from importlib.metadata import version
from typing import ClassVar

from conformance.subjects.maxtext.balance import MaxtextBalance
from conformance.subjects.maxtext.layer import MaxtextLayer
from conformance.subjects.maxtext.module import FLOAT32
from conformance.subjects.maxtext.router import MaxtextRouter


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
