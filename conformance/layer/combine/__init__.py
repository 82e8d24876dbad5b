"""conformance, layer, the stage combine: its requirements, their checks, and the faults that break them."""
