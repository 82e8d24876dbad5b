"""conformance, layer: sizes past the limits of tiles, warps, tables and dtypes, in layers small otherwise.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k.
"""

from typing import Any

from moe_ref import ExpertSpec, LayerSpec, RouterSpec, SharedSpec

TOKENS = (17, 33, 65, 129, 257, 1025)
"""One more than a power of 2, where a tile, a warp or a block of rows ends."""
ONE_LESS = (15, 31, 63)
"""Tokens, of one slot each, that leave one row of the last tile free."""
EXPERTS = ((33, 6), (64, 7), (127, 9), (128, 6), (129, 16), (255, 6), (256, 9), (257, 7), (300, 6), (384, 6))
"""(num_experts, top_k): around a warp, a byte and a bfloat16's whole numbers; more slots than a table of 8 holds."""
WIDTHS = ((65, 96), (96, 65), (129, 192), (192, 129), (96, 192), (192, 96), (96, 96))
"""(dim, hidden_dim)"""
FEW = 17
"""Tokens of a layer that is large in another way."""

SOFTMAX: dict[str, Any] = {"route_norm": True}
DEEPSEEK: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20}
GPT_OSS: dict[str, Any] = {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.75, "bias": True}


def _settings() -> list[tuple[LayerSpec, int]]:
    narrow, biased = ExpertSpec(dim=8, hidden_dim=24), ExpertSpec(dim=8, hidden_dim=24, **GPT_OSS)
    few = RouterSpec(num_experts=5, top_k=2, **SOFTMAX)
    grouped = RouterSpec(num_experts=8, top_k=3, **DEEPSEEK, num_expert_groups=4, num_limited_groups=2, route_scale=2.5)
    layers = [
        LayerSpec(router=few, experts=narrow),
        LayerSpec(router=grouped, experts=narrow),
        LayerSpec(router=few, experts=biased, gate_bias=True),
        LayerSpec(router=grouped, experts=narrow, shared=SharedSpec(hidden_dim=24)),
    ]
    found = [(layers[i % len(layers)], T) for i, T in enumerate(TOKENS)] + [(layers[0], TOKENS[-1])]
    for i, (E, K) in enumerate(EXPERTS):
        how = SOFTMAX if i % 2 else DEEPSEEK
        found.append((LayerSpec(router=RouterSpec(num_experts=E, top_k=K, **how), experts=narrow), FEW))
    for i, (D, F) in enumerate(WIDTHS):
        experts = ExpertSpec(dim=D, hidden_dim=F, bias=i == 2)
        shared = SharedSpec(hidden_dim=F) if i == 3 else None
        found.append((LayerSpec(router=few, experts=experts, shared=shared), FEW))
    # More choices than a warp has lanes, most of them null, and a token has one.
    single = RouterSpec(num_experts=24, top_k=1, num_null_experts=41, route_scale=6.0)
    found.append((LayerSpec(router=single, experts=narrow), FEW))
    one = RouterSpec(num_experts=4, top_k=1)
    return found + [(LayerSpec(router=one, experts=narrow), T) for T in ONE_LESS]


LARGE: list[tuple[LayerSpec, int]] = _settings()
"""(layer, tokens)"""


def _published() -> list[tuple[LayerSpec, int]]:
    narrow = ExpertSpec(dim=8, hidden_dim=24)
    plain: dict[str, Any] = {}
    selected: dict[str, Any] = {"score_over": "selected", "select_by": "logit"}
    found = []
    for E, K, how, T in (
        (256, 8, DEEPSEEK, 4), (128, 8, SOFTMAX, 16), (64, 6, plain, 64), (64, 8, SOFTMAX, 2), (32, 4, selected, 128),
        (512, 10, SOFTMAX, 3), (60, 4, plain, 256), (8, 2, SOFTMAX, 2049), (256, 8, DEEPSEEK, 1),
    ):  # fmt: skip
        found.append((LayerSpec(router=RouterSpec(num_experts=E, top_k=K, **how), experts=narrow), T))
    few = RouterSpec(num_experts=5, top_k=2, **SOFTMAX)
    return found + [
        (LayerSpec(router=few, experts=ExpertSpec(dim=D, hidden_dim=F)), 32) for D, F in ((64, 128), (128, 64))
    ]


PUBLISHED: list[tuple[LayerSpec, int]] = _published()
"""(layer, tokens): experts of public models, tokens and widths that fill a tile to its end. With a crowded bias some
experts have all tokens."""
THIN_LARGE: list[tuple[LayerSpec, int]] = [
    (
        LayerSpec(
            router=RouterSpec(num_experts=257, top_k=9, **DEEPSEEK),
            experts=ExpertSpec(dim=65, hidden_dim=96),
        ),
        129,
    )
]
"""For subjects that compile: one layer that is large in every way."""
