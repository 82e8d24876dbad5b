"""conformance, sharded, the stage dispatch: its requirements, their checks, and the faults that break them."""
