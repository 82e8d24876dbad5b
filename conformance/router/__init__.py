"""conformance, the kind router: from logits to ids and weights."""
