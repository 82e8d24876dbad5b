"""moe_ref, tests of aligned rows: by hand, and as a round trip."""

import numpy as np
import pytest

from moe_ref import (  # fmt: skip
    UNUSED,
    AlignSpec,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    align_rows,
    moe_layer,
    pad_rows,
    permute,
    run_experts,
    unpad_rows,
)

IDS_TK = np.array([[0, 2], [0, 3], [2, UNUSED], [0, 2]])
MULTIPLES = (1, 3, 8, 16, 32, 128)


@pytest.mark.parametrize(("idle_blocks", "middle"), [(0, []), (1, [UNUSED] * 2)])
def test_each_expert_has_its_slots_and_then_sentinels(idle_blocks, middle):
    found = align_rows(permute(IDS_TK, 4), AlignSpec(multiple=2, idle_blocks=idle_blocks))
    assert found.slot_of_row_A.tolist() == [0, 2, 6, UNUSED, *middle, 1, 4, 7, UNUSED, 3, UNUSED]
    assert found.rows_per_expert_E.tolist() == [4, len(middle), 4, 2]


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("idle_blocks", [0, 1])
def test_padding_is_undone_exactly_and_its_rows_are_zeros(multiple, idle_blocks):
    rng = np.random.default_rng(multiple)
    for num_tokens, num_experts in ((0, 3), (1, 9), (40, 7), (200, 3)):
        ids_TK = rng.integers(-1, num_experts, (num_tokens, 3))
        permutation = permute(ids_TK, num_experts)
        spec = AlignSpec(multiple=multiple, idle_blocks=idle_blocks)
        aligned = align_rows(permutation, spec)
        rows_ND = rng.normal(size=(len(permutation.order_N), 5))
        padded_AD = pad_rows(rows_ND, aligned)
        np.testing.assert_array_equal(unpad_rows(padded_AD, aligned), rows_ND)
        assert not padded_AD[aligned.slot_of_row_A == UNUSED].any()
        assert len(padded_AD) == aligned.rows_per_expert_E.sum() <= spec.max_rows(ids_TK.size, num_experts)
        assert spec.max_rows(ids_TK.size, num_experts) % multiple == 0


def test_the_experts_make_of_padded_rows_what_they_make_of_exact_ones():
    spec = LayerSpec(router=RouterSpec(num_experts=4, top_k=2), experts=ExpertSpec(dim=5, hidden_dim=3, bias=True))
    params, permutation = LayerParams.init(spec, 0), permute(IDS_TK, 4)
    rows_ND = np.random.default_rng(0).normal(size=(len(permutation.order_N), 5))
    exact_ND = run_experts(rows_ND, permutation.tokens_per_expert_E, params, spec.experts).output_RD
    aligned = align_rows(permutation, AlignSpec(multiple=8, idle_blocks=1))
    padded_AD = run_experts(pad_rows(rows_ND, aligned), aligned.rows_per_expert_E, params, spec.experts).output_RD
    np.testing.assert_allclose(unpad_rows(padded_AD, aligned), exact_ND, rtol=1e-13)
    x_TD = np.random.default_rng(1).normal(size=(6, 5))
    layers = [moe_layer(x_TD, params, spec, align=align).output_TD for align in (None, AlignSpec(multiple=16))]
    np.testing.assert_allclose(*layers, rtol=1e-13)


@pytest.mark.parametrize(
    ("field", "values"), [("multiple", {"multiple": 0}), ("idle_blocks", {"multiple": 8, "idle_blocks": 2})]
)
def test_what_is_out_of_range_is_named(field, values):
    with pytest.raises(ValueError, match=f"{field} is"):
        AlignSpec(**values)
