"""moe_ref, the specs and other data types: what moe_jax and moe_torch may import of the reference, and no algorithm."""
