"""conformance, balance, the stage load: its requirements, their checks, and the faults that break them."""
