"""conformance, router, the stage score: its requirements, their checks, and the faults that break them."""
