"""conformance, router, the stage weights: its requirements, their checks, and the faults that break them."""
