"""examples, vectors: the router of Qwen3-MoE and Mixtral in plain Python. This is the code that is judged."""

import math

KNOWN = {"num_experts", "top_k", "route_norm", "route_scale"}  # of RouterSpec; a softmax is its default


def route(logits, spec):
    """The ids and weights of one token."""
    exp = [math.exp(z - max(logits)) for z in logits]
    ids = sorted(range(len(exp)), key=lambda e: (-exp[e], e))[: spec["top_k"]]
    chosen = [exp[e] / sum(exp) for e in ids]
    norm = sum(chosen) if spec.get("route_norm", False) else 1.0
    return ids, [w / norm * spec.get("route_scale", 1.0) for w in chosen]
