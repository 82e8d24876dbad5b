"""conformance, the kind training: several layers over several steps, what they count and how their biases move."""
