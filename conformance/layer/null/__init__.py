"""conformance, layer, the stage null: its requirements, their checks, and the faults that break them."""
