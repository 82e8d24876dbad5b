"""conformance, router, the stage select: its requirements, their checks, and the faults that break them."""
