"""conformance, subject jax: arrays and parameters between NumPy and JAX."""

from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_ref import LayerParams, LayerSpec, RouterInputs, RouterSpec


def narrow(array: Any) -> Any:
    """float64 and int64 become their 32-bit kinds, as everywhere in JAX without jax_enable_x64; None stays None."""
    return None if array is None else jnp.asarray(on_host(array))


def on_host(array: Any) -> np.ndarray:
    """The same narrowing without a device: what is sharded is placed by the program that takes it."""
    array = np.asarray(array)
    kinds = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    return array.astype(kinds.get(array.dtype, array.dtype), copy=False)


def narrow_params(params: LayerParams) -> LayerParams:
    """Each parameter that there is, narrowed."""
    values: dict = {field.name: narrow(getattr(params, field.name)) for field in fields(LayerParams)}
    return LayerParams(**values)


def with_bias(params: LayerParams, spec: LayerSpec) -> LayerParams:
    """No balancing bias is one of zeros: one program less to compile."""
    if params.expert_bias_E is None and spec.router.takes_bias:
        return replace(params, expert_bias_E=np.zeros(spec.router.num_choices))
    return params


def narrow_inputs(inputs: RouterInputs, spec: RouterSpec) -> RouterInputs:
    """Narrowed; the seed becomes a key where the selector draws."""
    inputs = inputs.map(narrow)
    return replace(inputs, seed=jax.random.key(inputs.seed or 0)) if spec.selector == "random" else inputs


def to_numpy(array: jax.Array | None) -> np.ndarray | None:
    """On the host; None stays None."""
    return None if array is None else np.asarray(array)
