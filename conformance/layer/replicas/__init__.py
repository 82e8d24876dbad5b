"""conformance, layer, the stage replicas: its requirements, their checks, and the faults that break them."""
