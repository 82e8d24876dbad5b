"""moe_ref, what the tests of the sharded layer share: meshes, layers, and inputs by shard and for the whole batch."""

from dataclasses import fields
from typing import Any

import numpy as np
from derivatives import assert_close, router

from moe_ref import (
    ExpertSpec,
    LatentSpec,
    LayerParams,
    LayerSpec,
    RouterInputs,
    ShardLayout,
    SharedSpec,
)

D, F, E = 6, 4, 8
ROUNDING = 1e-13
"""Relative to the largest entry; sums have at most a few dozen terms near 1, in another order."""
EXPERTS = ExpertSpec(dim=D, hidden_dim=F, bias=True, activation="gelu")

MESHES: list[dict[str, Any]] = [
    {"expert": 2},
    {"expert": 4, "ranks_per_node": 2, "placement": (3, 0, 7, 1, 4, 2, 6, 5)},
    {"data": 2, "expert": 2, "tensor": 2, "num_token_chunks": 2},
    {"fsdp": 3, "tensor": 4, "num_emb_chunks": 3},
    {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2, "ranks_per_node": 1, "num_token_chunks": 3, "num_emb_chunks": 2},
    {"expert": 8, "ranks_per_node": 4, "fsdp": 5},
]


def layer_spec(name):
    """A layer around one of the routers: with a shared expert, the one the router scores where it scores any.

    "latent" is one of experts in a latent width, wider than the tokens.
    """
    latent = LatentSpec(dim=12, norm_eps=0.1) if name == "latent" else None
    spec = router("sigmoid_norm" if latent else name)
    shared = SharedSpec(hidden_dim=5) if spec.num_scored_shared_experts else SharedSpec(hidden_dim=5, gate="sigmoid")
    return LayerSpec(router=spec, experts=EXPERTS, shared=shared, gate_bias=True, latent=latent)


def uneven(layout: ShardLayout, rng, most=5) -> list[int]:
    """Tokens of each shard of a layout, as a rule of other numbers."""
    tokens = rng.integers(0, most + 1, layout.num_token_shards).tolist()
    tokens[0] = most
    return tokens


def inputs_of(spec, sizes, rng):
    """Tokens, gradients, masks and what the selector needs: by shard, and for the whole batch."""
    by_shard: dict[str, Any] = {
        "x": [rng.standard_normal((T, D)) for T in sizes],
        "d_output": [rng.standard_normal((T, D)) for T in sizes],
        "token_mask": [rng.random(T) < 0.8 for T in sizes],
    }
    more: dict[str, Any] = {}
    if spec.router.selector == "table":
        by_shard["token_ids"] = [rng.integers(0, 2, T) for T in sizes]
        more["table_VK"] = np.array([[0, 3, 7], [5, 2, 1]])
    if spec.router.selector == "given":
        by_shard["given_ids"] = [
            np.array([rng.permutation(9)[:3] - 1 for _ in range(T)], int).reshape(T, 3) for T in sizes
        ]
    if spec.router.selector == "random":
        more["seed"] = 5
    suffix = {"token_mask": "token_mask_T", "token_ids": "token_ids_T", "given_ids": "given_ids_TK"}
    whole: dict[str, Any] = {suffix[name]: np.concatenate(v) for name, v in by_shard.items() if name in suffix}
    sharded: dict[str, Any] = {f"{name}_by_shard": value for name, value in by_shard.items() if name in suffix}
    in_keywords = RouterInputs.keywords
    return by_shard["x"], by_shard["d_output"], in_keywords(whole | more), in_keywords(sharded | more)


def assert_same_gradients(found: LayerParams, expected: LayerParams, bound):
    for field in fields(LayerParams):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert_close(one, other, bound)
