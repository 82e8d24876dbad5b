"""conformance, the subjects of torchtitan."""
