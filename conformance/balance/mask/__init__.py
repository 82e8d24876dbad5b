"""conformance, balance, the stage mask: its requirements, their checks, and the faults that break them."""
