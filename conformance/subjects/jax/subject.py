"""conformance, a subject: moe_jax on the default JAX platform, or on the device that is asked for."""

from typing import Any

import jax

from conformance.subjects.jax.balance import JaxBalance
from conformance.subjects.jax.layer import JaxLayer
from conformance.subjects.jax.router import JaxRouter
from conformance.subjects.jax.training import JaxTraining

WHOLE = ("highest", "float32", "F32_F32_F32")
"""Names of `jax_default_matmul_precision` with which float32 products are float32 on every platform."""
HALF = ("fastest", "bfloat16", "BF16_BF16_F32")
"""Names with which an accelerator rounds their operands to bfloat16."""


class Jax(JaxRouter, JaxLayer, JaxBalance, JaxTraining):
    """moe_jax on one device, compiled."""

    name = "jax"
    version = jax.__version__
    logit_dtypes = ("float32", "bfloat16")
    compiles = True

    def to_device(self, device: str) -> None:
        """A platform of JAX, such as cpu, cuda or tpu, or one device of it, such as cuda:1.

        Products of the experts are bounded by what they are rounded to there; moe_jax asks for float32 in the gate
        whatever JAX's default is. JAX_DEFAULT_MATMUL_PRECISION=highest makes the experts' float32 too.
        """
        found = existing(device)
        jax.config.update("jax_default_device", found)
        self.expert_dtype = products_in(found.platform, jax.config.values["jax_default_matmul_precision"])


def existing(device: str) -> Any:
    """The device of a name.

    Raises:
        ValueError: there is none.
    """
    platform, _, number = device.partition(":")
    try:
        found = jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(f"there is no such device: {str(error).splitlines()[0]}") from None
    if number and not (number.isdecimal() and int(number) < len(found)):
        raise ValueError(f"there is no such device: {platform} has the numbers 0 to {len(found) - 1}")
    return found[int(number or 0)]


def products_in(platform: str, precision: str | None) -> str:
    """The dtype to which operands of a float32 product are rounded.

    Args:
        precision: what `jax_default_matmul_precision` says. None: TF32 on a GPU, bfloat16 on a TPU.
    """
    if platform == "cpu" or precision in WHOLE:
        return "float32"
    if precision in HALF or (platform == "tpu" and precision in (None, "default")):
        return "bfloat16"
    return "tf32"
