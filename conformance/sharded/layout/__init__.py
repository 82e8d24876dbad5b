"""conformance, sharded, the stage layout: its requirements, their checks, and the faults that break them."""
