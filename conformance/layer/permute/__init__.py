"""conformance, layer, the stage permute: its requirements, their checks, and the faults that break them."""
