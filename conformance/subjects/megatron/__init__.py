"""conformance, the subjects of megatron-core."""
