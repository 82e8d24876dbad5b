"""conformance, the suite: a file for each stage, a test for each requirement; a test's docstring is its sentence."""
