"""conformance, layer, the stage latent: its requirements, their checks, and the faults that break them."""
