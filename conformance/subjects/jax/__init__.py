"""conformance, the subjects of jax."""
