"""conformance, identify: which RouterSpec an unknown router computes, found by asking it."""
