"""conformance, training, the stage steps: its requirements, their checks, and the faults that break them."""
