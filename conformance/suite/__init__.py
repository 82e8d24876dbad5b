"""conformance, the suite: a test for each requirement, whose sentence is its docstring; small worlds; deviations."""
