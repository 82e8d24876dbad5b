"""conformance, layer, the stage replay: its requirements, their checks, and the faults that break them."""
