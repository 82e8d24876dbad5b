"""moe_jax, the layer over a mesh of devices."""
