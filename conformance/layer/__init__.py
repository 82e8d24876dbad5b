"""conformance, the kind layer: tokens become tokens on one device."""
