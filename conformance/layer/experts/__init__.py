"""conformance, layer, the stage experts: its requirements, their checks, and the faults that break them."""
