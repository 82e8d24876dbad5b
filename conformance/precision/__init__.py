"""conformance, precision: what a router does when one stage of it alone is coarse."""
