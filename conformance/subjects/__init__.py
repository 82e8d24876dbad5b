"""conformance, the subjects: one file for each implementation that is judged."""
