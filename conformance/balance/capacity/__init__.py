"""conformance, balance, the stage capacity: its requirements, their checks, and the faults that break them."""
