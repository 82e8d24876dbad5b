"""Tests: the MoE blocks of transformers are called rightly, so that what they return is theirs."""

from dataclasses import fields

import numpy as np
import pytest
from layer_agreement import (
    FLOAT32,
    SHARED,
    D,
    F,
    assert_experts_agree,
    assert_layer_agrees,
    assert_no_token_is_no_crash,
    params_of,
    tokens,
)

from conformance.core.capabilities import capabilities
from conformance.core.subject import Unsupported
from moe_ref import ExpertSpec, LayerSpec, RouterSpec, SharedSpec
from moe_ref.specs.families import FAMILIES, tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conformance.subjects.transformers.arrays import (  # noqa: E402
    to_canonical,
    to_native,
)
from conformance.subjects.transformers.blocks import (  # noqa: E402
    BLOCKS,
    NO_BLOCK,
)
from conformance.subjects.transformers.router import told, turn  # noqa: E402
from conformance.subjects.transformers.subject import (  # noqa: E402
    Transformers,
    TransformersGroupedMm,
)


def block_spec(name: str) -> LayerSpec:
    """A layer that the block of a family computes."""
    return BLOCKS[name].example(tiny(name), D, F)


CASES = [(name, each) for name, block in BLOCKS.items() for each in block.implementations]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_the_real_block_of_a_family_agrees_with_the_reference(name, implementation):
    spec, subject = block_spec(name), Transformers(name, implementation)
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    assert subject.supports_layer(spec) is None
    # The gradient of a global scale is one sum over everything, in which much cancels; 2.7e-6 is seen.
    bound = 2 * FLOAT32 if (name, implementation) == ("inkling", "batched_mm") else FLOAT32
    assert_layer_agrees(subject, spec, params, bound)
    if name != "longcat_flash":
        assert_experts_agree(subject, spec, params, FLOAT32)
    assert_no_token_is_no_crash(subject, spec, params)
    assert subject.last_family == name
    assert capabilities(subject) >= {"experts", "layer", "layer_gradients"}


def test_every_family_has_a_block_or_a_reason():
    assert BLOCKS.keys() | NO_BLOCK.keys() == FAMILIES.keys()
    assert not BLOCKS.keys() & NO_BLOCK.keys()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_layout_and_back_is_the_identity(name):
    params = params_of(block_spec(name))
    found = to_canonical(BLOCKS[name], to_native(BLOCKS[name], params), params)
    names = {field.name for field in fields(params) if getattr(params, field.name) is not None}
    assert found.keys() == names - {"expert_bias_E"}
    for field, value in found.items():
        np.testing.assert_array_equal(value, getattr(params, field))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"dim": 5, "hidden_dim": 7}),
        ("mixtral", {"dim": 6, "hidden_dim": 3}),
        ("gpt_oss", {"dim": 4, "hidden_dim": 2}),
        ("llama4", {"dim": 6, "hidden_dim": 6}),
        ("dbrx", {"dim": 3, "hidden_dim": 5}),
        ("deepseek_v3", {"dim": 7, "hidden_dim": 4}),
    ],
)
def test_the_loop_takes_any_size(name, changes):
    spec = block_spec(name)
    spec = spec.replace(experts=spec.experts.replace(**changes))
    if spec.shared is not None:
        spec = spec.replace(shared=spec.shared.replace(hidden_dim=changes["hidden_dim"]))
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    assert_layer_agrees(Transformers(name), spec, params, FLOAT32)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mixtral", LayerSpec(router=tiny("mixtral").replace(top_k=1), experts=ExpertSpec(dim=D, hidden_dim=F))),
        ("qwen3_moe", LayerSpec(router=tiny("qwen3_moe").replace(top_k=8), experts=ExpertSpec(dim=D, hidden_dim=F))),
        ("gpt_oss", block_spec("gpt_oss").replace(experts=block_spec("gpt_oss").experts.replace(clamp=None))),
        ("cohere2_moe", block_spec("cohere2_moe").replace(shared=None)),
        ("ernie4_5_moe", block_spec("ernie4_5_moe").replace(shared=None)),
        ("step3p7", block_spec("step3p7").replace(shared=SharedSpec(hidden_dim=20))),
    ],
)
def test_further_fields_reach_the_block(name, spec):
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    assert_layer_agrees(Transformers(name), spec, params, FLOAT32)


def test_a_block_is_found_for_a_layer():
    subject = Transformers()
    spec = block_spec("qwen2_moe")
    assert_layer_agrees(subject, spec, params_of(spec, biased=False), FLOAT32)
    assert BLOCKS[subject.last_family].shared is not None


def test_a_layer_that_no_block_computes_gets_a_sentence():
    spec = block_spec("mixtral")
    subject = Transformers("mixtral")
    assert "experts.bias (False, not True)" in str(
        subject.supports_layer(spec.replace(experts=spec.experts.replace(bias=True)))
    )
    assert "shared (none, not one)" in str(subject.supports_layer(spec.replace(shared=SHARED)))
    assert "gate_bias (False, not True)" in str(subject.supports_layer(spec.replace(gate_bias=True)))
    assert "router.route_scale (1.0, not 2.0)" in str(
        subject.supports_layer(spec.replace(router=spec.router.replace(route_scale=2.0)))
    )
    assert "layout" not in str(subject.supports_layer(spec))
    wide = block_spec("deepseek_v3")
    assert "shared.hidden_dim (a multiple of 8, not 9)" in str(
        Transformers("deepseek_v3").supports_layer(wide.replace(shared=SharedSpec(hidden_dim=9)))
    )
    assert "shared (always one, not none)" in str(Transformers("deepseek_v3").supports_layer(wide.replace(shared=None)))
    assert "no transformers block computes this" in str(Transformers().supports_layer(spec.replace(gate_bias=True)))
    odd = block_spec("deepseek_ocr2")
    assert "experts.dim (even, not 7)" in str(
        Transformers("deepseek_ocr2").supports_layer(odd.replace(experts=odd.experts.replace(dim=7)))
    )
    assert "ends in a norm" in str(Transformers("axk1").supports_layer(wide))


def test_what_grouped_mm_does_not_take_gets_a_sentence():
    subject, spec = TransformersGroupedMm(), block_spec("mixtral")
    assert subject.supports_layer(spec) is None
    narrow = spec.replace(experts=spec.experts.replace(hidden_dim=6))
    assert "experts are 16 and 6 wide; grouped_mm takes" in str(subject.supports_layer(narrow))
    assert "dbrx computes this layer, but its experts have no grouped_mm" in str(
        Transformers("dbrx", "grouped_mm").supports_layer(block_spec("dbrx"))
    )
    # The kernel's own limit, not ours.
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        torch.nn.functional.grouped_mm(torch.ones(4, 6), torch.ones(1, 6, 4), offs=torch.tensor([4], dtype=torch.int32))
    with pytest.raises(
        ValueError, match="experts_implementation is 'fast'; it is one of eager, grouped_mm, batched_mm"
    ):
        Transformers("mixtral", "fast")


def test_a_bias_without_a_place_in_the_block_is_unsupported():
    spec, subject = block_spec("olmoe"), Transformers("olmoe")
    with pytest.raises(Unsupported, match="olmoe computes this layer, but without an expert bias"):
        subject.layer(tokens()[0], params_of(spec), spec)


def test_longcat_flash_takes_no_token_that_has_one_expert():
    spec = block_spec("longcat_flash")
    single = spec.replace(router=spec.router.replace(top_k=1))
    subject = Transformers("longcat_flash")
    with pytest.raises(ValueError, match="not enough values to unpack"):
        subject.layer(tokens()[0], params_of(single), single)
    with pytest.raises(Unsupported, match="single expert"):
        subject.experts(tokens()[0], np.zeros(8, int), params_of(spec), spec)


def test_blocks_and_implementations_take_turns_by_spec_and_number_of_tokens():
    subject, spec, found = Transformers(), block_spec("mixtral"), set()
    for num_tokens in range(1, 40):
        subject.layer(tokens(num_tokens)[0], params_of(spec, biased=False), spec)
        found.add((subject.last_family, subject.last_implementation))
    assert len({family for family, _ in found}) > 3
    assert {implementation for _, implementation in found} == {"eager", "grouped_mm", "batched_mm"}


def test_a_field_that_is_as_by_default_decides_no_turn():
    router, experts = RouterSpec(num_experts=4, top_k=2), ExpertSpec(dim=8, hidden_dim=16)
    spec = LayerSpec(router=router, experts=experts)
    assert told((spec, (3, 5), "eager")) == (
        {"router": {"num_experts": 4, "top_k": 2}, "experts": {"dim": 8, "hidden_dim": 16}}, (3, 5), "eager",
    )  # fmt: skip
    assert {turn((router, n), 3) for n in range(20)} == {0, 1, 2}
