"""conformance, precision: dtypes are rounded to as libraries do, and a declared class forgives what it says alone."""

import copy

import numpy as np
import pytest

from conformance.core.judge import Judge
from conformance.core.rounding import COARSE, PACKED, Precision, coarse, rounded_to
from conformance.core.trial import accuse
from conformance.precision.audit import STAGES, batch, coarser, effect, effects, given
from conformance.precision.page import contract, distinct
from conformance.precision.subject import measured
from conformance.run.cli import main
from conformance.subjects.reference import Reference
from moe_ref import RouterSpec
from moe_ref.specs.families import FAMILIES

EXAMPLES = 12
SOME = ("SCR-2", "SEL-2", "SEL-4", "WGT-2", "WGT-3")
"""What the classes are tried on: scores, choice without a bias and with it, weights with a norm and without."""


class Coarse(Reference):
    """The reference in float32 with one stage of its router in a coarser dtype."""

    logit_dtypes = ("float32",)

    def __init__(self, stage: str, dtype: str, *, declared: bool = True, leaks: bool = False):
        self.stage, self.coarse, self.leaks = stage, dtype, leaks
        self.exact = Precision("float32", **{stage: dtype}) if declared else "float32"

    @property
    def compute_dtype(self) -> str:
        return self.exact

    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        logits_TE, expert_bias_E = given(self.stage, self.coarse, logits_TE, expert_bias_E, to=np.float32)
        with coarser(self.stage, self.coarse):
            found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        if self.leaks:  # one weight in a hundred off by a hundredth: more than bfloat16 explains
            found.weights_TK[..., -1] *= 1.02
        return found


def accused(subject: Reference, *ids: str) -> list[str]:
    return list(accuse(Judge(subject), ids=ids, examples=EXAMPLES))


@pytest.mark.parametrize(
    ("stage", "dtype", "where"),
    [
        ("scores", "bfloat16", "SCR-2"),
        ("scores", PACKED, "SCR-2"),
        ("bias", "bfloat16", "SEL-4"),
        ("selection", "bfloat16", "SEL-2"),
        ("selection", PACKED, "SEL-2"),
        ("weights", "bfloat16", "WGT-3"),
    ],
)
def test_a_class_that_is_declared_is_not_accused_and_one_that_is_not_is(stage, dtype, where):
    assert accused(Coarse(stage, dtype), *SOME) == []
    assert where in accused(Coarse(stage, dtype, declared=False), where)


def test_a_declared_class_forgives_nothing_that_it_does_not_explain():
    """Planted: a weight that is 2 % off beside declared bfloat16 scores, and coarse weights beside a declared bias."""
    assert accused(Coarse("scores", "bfloat16", leaks=True), "WGT-3") == ["WGT-3"]
    other = Coarse("weights", "bfloat16")
    other.exact = Precision("float32", bias="bfloat16")
    assert accused(other, "WGT-3") == ["WGT-3"]


def test_a_class_is_checked_and_is_the_dtype_that_it_refines():
    found = Precision("float32", scores="bfloat16")
    assert found == "float32"
    assert found.words == "float32, scores in bfloat16"
    assert Judge(Coarse("scores", "bfloat16")).where == "in float32, scores in bfloat16"
    assert Judge(Reference()).where == ""
    assert copy.deepcopy(found).stages == found.stages
    assert coarse(found, "scores", 8) == 2.0**-8
    assert coarse(Precision(selection=PACKED), "selection", 256) == 2.0**-15
    assert coarse("float32", "scores", 8) == coarse(found, "bias", 8) == 0
    with pytest.raises(ValueError, match=r"stage is .score.; it is one of scores, .*did you mean scores"):
        Precision("float32", score="bfloat16")
    with pytest.raises(ValueError, match="bias is 'packed_index'"):
        Precision("float32", bias=PACKED)
    assert all(Precision("float32", **{stage: dtype}) for stage, known in COARSE.items() for dtype in known)


def test_rounding_is_to_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with the frameworks; the rounding is our own")
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=999), [1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0, -np.inf, 3e38, 1e-40]])
    values = values.astype(np.float32)
    np.testing.assert_array_equal(rounded_to(values, "bfloat16"), values.astype(ml_dtypes.bfloat16).astype(np.float64))


def test_a_packed_index_keeps_the_order_of_what_differs_and_lets_the_lower_of_equals_win():
    values = np.array([[0.5, 0.5, -0.25, -0.25, 0.75, 1.5, -1.5, 0.5]])
    packed = rounded_to(values, PACKED)
    np.testing.assert_array_equal(np.argsort(-packed, kind="stable"), np.argsort(-values, kind="stable"))
    assert len(np.unique(packed)) == 8
    assert (np.abs(packed - values) <= coarse(Precision(selection=PACKED), "selection", 8) * np.abs(values)).all()


def test_an_audit_shows_the_stage_that_is_coarse():
    family = FAMILIES["deepseek_v3"]
    own = batch(family.router, tokens=512, seed=0, expert_bias=True)
    found = effects(own, "bfloat16")
    assert list(found) == list(STAGES)
    assert found["selection"].changed > found["bias"].changed > 0
    assert found["selection"].largest < 1e-12  # weights are read from exact scores
    assert found["weights"].changed == 0
    assert 1e-3 < found["weights"].rms < 2.0**-7
    assert effect(own, "selection", "float16").changed < found["selection"].changed
    said = contract({dtype: effects(own, dtype) for dtype in ("bfloat16", "float16")}, 1e-3)
    assert "scores, selection in float32" in said


def test_a_subject_is_as_exact_as_its_class():
    own = batch(RouterSpec(num_experts=64, top_k=6, score_func="sigmoid", route_norm=True),
                tokens=64, seed=1, expert_bias=True)  # fmt: skip
    exact, rough = measured(Reference(), own), measured(Coarse("weights", "bfloat16"), own)
    assert exact is not None
    assert rough is not None
    assert (exact.explained_by, exact.effect.changed) == ("float32", 0)
    assert rough.explained_by in ("float32, scores in bfloat16", "float32, weights in bfloat16")
    assert len(list(distinct())) > 30


def test_the_command_prints_a_family_a_subject_and_the_nearest_name(capsys):
    assert main(["precision", "mixtral", "--tokens", "64"]) == 0
    assert "under 0.001: " in capsys.readouterr().out
    assert main(["precision", "mixtrall"]) == 4
    assert "did you mean mixtral" in capsys.readouterr().err
