"""conformance, pictures: what a layout moves, and how even a load is."""
