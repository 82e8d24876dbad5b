"""conformance, router, the stage run: its requirements, their checks, and the faults that break them."""
