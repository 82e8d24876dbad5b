"""conformance, router, the stage groups: its requirements, their checks, and the faults that break them."""
