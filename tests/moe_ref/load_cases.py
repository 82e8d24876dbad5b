"""moe_ref, what the tests of load share: sizes that are distinct primes, so that nothing broadcasts by accident."""

import numpy as np

from moe_ref import RouterSpec, route

B, S, E, K = 3, 5, 7, 2
T = B * S
SEQUENCES = (S,) * B


def routed(seed=0, num_tokens=T, top_k=K, num_experts=E, bias=True):
    """Logits, and the ids of a router whose bias makes the choice differ from the largest scores."""
    rng = np.random.default_rng(seed)
    logits_TE = 1.5 * rng.standard_normal((num_tokens, num_experts))
    expert_bias_E = 0.3 * rng.standard_normal(num_experts) if bias else None
    routing = route(logits_TE, RouterSpec(num_experts=num_experts, top_k=top_k), expert_bias_E=expert_bias_E)
    return logits_TE, routing.expert_ids_TK, routing.weights_TK


def one_hot(ids):
    return (np.asarray(ids)[..., None] == np.arange(E)).astype(float)


def softmax(logits):
    exp = np.exp(logits)
    return exp / exp.sum(axis=-1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def largest(scores, k=K):
    return np.argsort(-scores, axis=-1)[..., :k]
