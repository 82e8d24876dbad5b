"""conformance, layer, the stage backward: its requirements, their checks, and the faults that break them."""
