"""conformance, the subjects of torch."""
