"""conformance, the subjects of transformers."""
