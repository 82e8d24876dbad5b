"""conformance, vectors: stored calls with what they return, for an implementation in any language."""
