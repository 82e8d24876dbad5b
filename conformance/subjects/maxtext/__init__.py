"""conformance, the subjects of maxtext."""
