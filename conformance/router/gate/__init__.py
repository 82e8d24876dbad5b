"""conformance, router, the stage gate: its requirements, their checks, and the faults that break them."""
