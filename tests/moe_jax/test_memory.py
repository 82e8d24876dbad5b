"""moe_jax, tests of memory: layers of published sizes are lowered, forward and backward, without a number of theirs.

What XLA may keep at once is the arrays of the program: no one is larger than the rows or the weights are.
"""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from moe_jax import dense_matmul, sparse_matmul
from moe_ref import ExpertSpec, LayerParams, LayerSpec
from moe_ref.specs.families import preset

T = 4093  # a prime, so that an axis of R or T is no other one
SIZES = {
    # name of the preset -> D, F of its public checkpoint
    "qwen3_moe": (2048, 768),
    "deepseek_v3": (7168, 2048),
    "gpt_oss": (2880, 2880),
    "mixtral": (4096, 14336),
}


def shapes_of(layer, name: str, platform: str) -> tuple[LayerSpec, set[tuple[int, ...]]]:
    """The spec, and the shapes of all arrays of the program of its forward and backward pass."""
    (D, F), router = SIZES[name], preset(name)
    E, has_bias = router.num_experts, name == "gpt_oss"
    spec = LayerSpec(router=router, experts=ExpertSpec(dim=D, hidden_dim=F, bias=has_bias))
    of = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    biases = {"b_gate_EF": of((E, F)), "b_up_EF": of((E, F)), "b_down_ED": of((E, D))} if has_bias else {}
    params = LayerParams(
        gate_ED=of((E, D)), w_gate_EDF=of((E, D, F)), w_up_EDF=of((E, D, F)), w_down_EFD=of((E, F, D)), **biases
    )

    def step(x_TD, params):
        return jax.grad(lambda x_TD, params: layer(x_TD, params, spec)[0].astype(jnp.float32).sum(), (0, 1))(
            x_TD, params
        )

    lowered = jax.jit(step).trace(of((T, D)), params).lower(lowering_platforms=(platform,))
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]\w*>", lowered.as_text())
    return spec, {tuple(map(int, axes.split("x")[:-1])) for axes in found}


def check(spec: LayerSpec, shapes: set[tuple[int, ...]]) -> None:
    D, F, E = spec.experts.dim, spec.experts.hidden_dim, spec.router.num_experts
    R = T * spec.router.top_k
    assert (R, D) in shapes
    assert [shape for shape in shapes if math.prod(shape) > max(E * D * F, R * max(D, F))] == []
    assert [shape for shape in shapes if R in shape and E in shape] == []


@pytest.mark.parametrize("name", SIZES)
def test_no_array_is_larger_than_the_weights_or_the_rows(name):
    check(*shapes_of(sparse_matmul, name, "cpu"))


@pytest.mark.filterwarnings("ignore:grouped_matmul of moe_jax takes the way 'blocked'")
def test_on_cuda_without_tokamax_neither():
    check(*shapes_of(sparse_matmul, "deepseek_v3", "cuda"))


@pytest.mark.parametrize("layer", [dense_matmul, partial(sparse_matmul, implementation="ragged")])
def test_a_layer_with_all_experts_on_all_tokens_is_seen(layer):
    spec, shapes = shapes_of(layer, "qwen3_moe", "cpu")
    with pytest.raises(AssertionError):
        check(spec, shapes)
