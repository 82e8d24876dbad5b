"""Tests: what docs/families.md says of real routers and blocks is of every family, of this release, and found again."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.run.verified import DTYPES, Verified, measure, stored
from conformance.subjects.transformers.blocks import BLOCKS
from conformance.subjects.transformers.families import ROUTERS, findings
from moe_ref.specs.families import FAMILIES

STALE = "it is stale: run `python -m tools.families`"


def test_what_is_stored_is_of_every_family():
    found = stored()[1]
    assert list(found) == list(FAMILIES), STALE
    assert all(list(by_dtype) == list(DTYPES) for by_dtype in found.values()), STALE
    judged = {name for name, by_dtype in found.items() if by_dtype["float32"].output is not None}
    assert judged == BLOCKS.keys(), STALE


def test_what_is_stored_is_of_the_release_that_is_installed():
    pytest.importorskip("transformers")
    assert stored()[0]["transformers"] == version("transformers"), STALE


def test_a_family_that_does_not_agree_in_float32_has_a_page_that_says_why():
    differ = [
        name
        for name, by_dtype in stored()[1].items()
        if not by_dtype["float32"].router_agrees or not (by_dtype["float32"].block_agrees or name not in BLOCKS)
    ]
    assert differ == ["zaya"]
    assert all(findings(name) for name in differ)
    folder = Path(__file__).parents[2] / "docs" / "findings"
    assert all((folder / f"{page}.md").exists() for name in ROUTERS for page in findings(name))


@pytest.mark.parametrize("name", ["deepseek_v3", "lfm2_moe", "zaya"])
def test_what_is_stored_is_found_again(name):
    pytest.importorskip("transformers")
    for dtype, found in measure(name).items():
        assert_like(found, stored()[1][name][dtype])


def assert_like(found: Verified, held: Verified):
    """Another machine sums in another order: rounding by rounding the errors differ, not in their size."""
    assert abs(found.others - held.others) <= 3
    assert held.weight / 4 <= found.weight <= 4 * held.weight
    if held.output is None or found.output is None:
        assert found.output is held.output
    else:
        assert held.output / 4 <= found.output <= 4 * held.output


def test_a_planted_deviation_is_measured(monkeypatch):
    """Weights that are a thousandth off, a token with other experts, and twice the output."""
    pytest.importorskip("transformers")
    from conformance.subjects.transformers.subject import Transformers

    clean_route, clean_layer = Transformers.route, Transformers.layer

    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        found = clean_route(self, logits_TE, spec, expert_bias_E, **inputs)
        ids_TK = found.expert_ids_TK.copy()
        ids_TK[0] = (ids_TK[0] + 1) % spec.num_experts
        return replace(found, expert_ids_TK=ids_TK, weights_TK=found.weights_TK * 1.001)

    monkeypatch.setattr(Transformers, "route", route)
    monkeypatch.setattr(Transformers, "layer", lambda self, *arguments: 2 * clean_layer(self, *arguments))
    found = measure("deepseek_v3")["float32"]
    assert not found.router_agrees
    assert not found.block_agrees
    assert found.others == 1
    assert found.weight == pytest.approx(1e-3, rel=0.01)
