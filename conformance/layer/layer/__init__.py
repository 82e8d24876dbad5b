"""conformance, layer, the stage layer: its requirements, their checks, and the faults that break them."""
