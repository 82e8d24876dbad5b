"""conformance, a subject: moe_jax on the default JAX platform."""

import jax

from conformance.subjects.jax.balance import JaxBalance
from conformance.subjects.jax.layer import JaxLayer
from conformance.subjects.jax.router import JaxRouter
from conformance.subjects.jax.training import JaxTraining


class Jax(JaxRouter, JaxLayer, JaxBalance, JaxTraining):
    """moe_jax on one device, compiled."""

    name = "jax"
    version = jax.__version__
    logit_dtypes = ("float32", "bfloat16")
    compiles = True
