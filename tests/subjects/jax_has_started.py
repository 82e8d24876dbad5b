"""Tests, a module that starts JAX on import, as none that a server preloads may."""

import jax

jax.devices()
