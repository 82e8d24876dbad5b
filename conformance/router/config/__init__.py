"""conformance, router, the stage config: its requirements, their checks, and the faults that break them."""
