"""moe_jax: the Mixture-of-Experts layer in JAX, equal to moe_ref and fast."""

from moe_jax import pytrees as pytrees
