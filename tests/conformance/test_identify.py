"""tests of identify: a router of a known spec is found by its answers alone, and a wrong one is shown to be wrong."""

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

from conformance import Routing, Subject
from conformance.core.subject import Unsupported
from conformance.identify import answer
from conformance.identify.box import Box, Malformed
from conformance.identify.choice import groupings
from conformance.identify.equal import RULES, alternatives, normal
from conformance.identify.law import near_numbers
from conformance.identify.misfit import smallest_difference
from conformance.identify.named import families_of
from conformance.identify.search import Identity, identify
from conformance.router.draw import SPECS, bias_of_kind, inputs_of
from conformance.run.cli import main
from conformance.run.kinds import load_faults
from conformance.subjects.reference import Reference
from moe_ref import RouterInputs, RouterSpec, route
from moe_ref.rounding import round_to
from moe_ref.specs.families import FAMILIES, tiny

HANDED = RouterSpec(num_experts=16, top_k=4)
"""Tells 16 experts and top_k 4, and nothing of the routers below."""
DEEPSEEK = RouterSpec(
    num_experts=16, top_k=4, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2, route_norm=True,
    norm_eps=1e-20, route_scale=2.5,
)  # fmt: skip


def top_k(values_TE, k):
    return np.argsort(-values_TE, axis=-1, kind="stable")[:, :k]


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


class Right(Subject):
    """DeepSeek-V3 in plain NumPy; it reads nothing of its spec."""

    fill, top_k, scale = -np.inf, 4, np.float32(2.5)

    def scores(self, logits_TE):
        return np.exp(-np.logaddexp(0, -logits_TE))

    def choice(self, scores_TE, bias_E):
        return scores_TE if bias_E is None else scores_TE + bias_E

    def weighed(self, scores_TE, choice_TE):
        return scores_TE

    def select(self, choice_TE):
        return top_k(choice_TE, self.top_k)

    def kept(self, scores_TE, choice_TE):
        groups_TG = np.sort(choice_TE.reshape(-1, 4, 4))[:, :, -2:].sum(axis=-1)
        kept_TG = np.zeros(groups_TG.shape, bool)
        np.put_along_axis(kept_TG, top_k(groups_TG, 2), True, axis=-1)
        return np.repeat(kept_TG, 4, axis=-1)

    def route(self, logits_TE, spec, expert_bias_E):
        scores_TE = self.scores(logits_TE)
        choice_TE = self.choice(scores_TE, expert_bias_E)
        ids_TK = self.select(np.where(self.kept(scores_TE, choice_TE), choice_TE, self.fill))
        weights_TK = np.take_along_axis(self.weighed(scores_TE, choice_TE), ids_TK, axis=-1)
        weights_TK = weights_TK / (weights_TK.sum(axis=-1, keepdims=True) + np.float32(1e-20)) * self.scale
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK)


class BiasLeaks(Right):
    def weighed(self, scores_TE, choice_TE):
        return choice_TE


class FilledWith0(Right):
    fill = 0.0


class Float16Scores(Right):
    def scores(self, logits_TE):
        return super().scores(logits_TE).astype(np.float16).astype(np.float32)


class OneTooMany(Right):
    top_k = 5


class BestSkipped(Right):
    def select(self, choice_TE):
        return top_k(choice_TE, 5)[:, 1:]


class GroupsWithoutBias(Right):
    def kept(self, scores_TE, choice_TE):
        return super().kept(scores_TE, scores_TE)


class InterleavedGroups(Right):
    """Expert i is in group i % 4."""

    places = np.arange(16).reshape(4, 4).T.ravel()

    def route(self, logits_TE, spec, expert_bias_E):
        bias_E = None if expert_bias_E is None else expert_bias_E[self.places]
        found = super().route(logits_TE[:, self.places], spec, bias_E)
        return Routing(expert_ids_TK=self.places[found.expert_ids_TK], weights_TK=found.weights_TK)


class SelectedTwiceScaled(Subject):
    """A softmax over the selected with a scale that no family has, and no bias."""

    def route(self, logits_TE, spec, expert_bias_E):
        if expert_bias_E is not None:
            raise Unsupported("no bias here")
        ids_TK = top_k(logits_TE, 4)
        return Routing(
            expert_ids_TK=ids_TK, weights_TK=np.float32(0.7) * softmax(np.take_along_axis(logits_TE, ids_TK, -1))
        )


class NormedTwiceByRoot(Subject):
    """The scale is a square root of the weights: no spec does that."""

    def route(self, logits_TE, spec, expert_bias_E):
        ids_TK = top_k(logits_TE, 4)
        weights_TK = np.sqrt(softmax(np.take_along_axis(logits_TE, ids_TK, -1)))
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK * (1 + weights_TK))


@cache
def identity(made, handed: RouterSpec = HANDED) -> Identity:
    return identify(made(), handed)


@cache
def page(made) -> str:
    return answer.text(identity(made), load_faults())


# right ones

TRIED = (
    "deepseek_v3", "muse_spark", "laguna", "inkling", "deepseek_v4", "deepseek_v4_hash", "llama4", "gemma4",
    "longcat_flash", "zaya", "gpt_oss", "phimoe",
)  # fmt: skip
"""A family of each kind of router; `moe-conformance identify transformers --family NAME` asks any of them."""


def is_family(found: Identity, name: str) -> bool:
    takes = found.box.takes_bias and found.guess.bias_used
    return found.fits and normal(found.spec, takes)[0] == normal(tiny(name), takes)[0]


@pytest.mark.parametrize("name", TRIED)
def test_a_family_is_found_from_its_real_module(name):
    subject = pytest.importorskip("conformance.subjects.transformers.subject")
    found = identify(subject.Transformers(family=name), tiny(name))
    assert is_family(found, name)
    assert name in families_of(found).exact
    assert all(each.why for each in found.open)


OTHERS = (
    {"norm_p": 1.7, "route_norm": True, "route_scale": 3.0},
    {"score_func": "sigmoid", "route_norm": True, "norm_form": "clamp", "norm_eps": 1e-3},
    {"logit_scale": 3.0, "logit_softcap": 6.0},
    {"score_func": "sigmoid", "num_null_experts": 2, "null_kind": "skip", "route_norm": True},
    {"selector": "round_robin", "score_func": "sigmoid"},
    {"selector": "given", "score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-6},
    {"selector": "sparsemixer", "select_by": "logit", "mixer_eps": 0.04},
    {"num_expert_groups": 4, "num_limited_groups": 2, "select_by": "logit", "mask_fill": 0.0, "group_score_k": 1},
    {"num_expert_groups": 2, "num_limited_groups": 1, "group_score_k": 3, "score_func": "sqrtsoftplus"},
    {"top_k": 4, "selector": "group_top_k", "quota_groups": 2, "route_norm": True},
)


@pytest.mark.parametrize("fields", OTHERS, ids=lambda fields: "-".join(fields))
def test_a_spec_that_no_family_has_is_found(fields):
    spec = RouterSpec(**{"num_experts": 8, "top_k": 3} | fields)
    found = identify(Reference(), spec)
    takes = found.box.takes_bias and found.guess.bias_used
    assert found.fits
    assert normal(found.spec, takes)[0] == normal(spec, takes)[0]


THRESHOLD, TAKING = {"top_k": 8, "selector": "threshold"}, {"top_k": 8, "selector": "expert_choice"}
COUNTS = (
    {"selector": "sinkhorn", "select_by": "logit", "score_func": "sigmoid"},
    TAKING | {"take_factor": 2.0},
    TAKING | {"take_factor": 1.25, "take_rounding": "floor", "take_least": 4, "score_func": "sigmoid"},
    THRESHOLD | {"score_func": "relu"},
    THRESHOLD | {"score_func": "sigmoid", "threshold": 0.3, "route_norm": True},
    THRESHOLD | {"top_k": 4, "threshold": 0.125},
    THRESHOLD | {"select_by": "logit", "threshold": -0.5},
    {"top_k": 8, "selector": "top_p", "top_p": 0.4},
    {"top_k": 4, "selector": "top_p", "top_p": 0.65, "route_norm": True, "route_scale": 2.5},
)
"""Other tokens, or other batches, have other numbers of experts; or the same, by what the others of the batch are."""


def asked(fields: dict) -> tuple[Identity, RouterSpec]:
    values: dict[str, Any] = {"num_experts": 8, "top_k": 3} | fields
    spec = RouterSpec(**values)
    return identify(Reference(), spec), spec


@pytest.mark.parametrize("fields", COUNTS, ids=lambda fields: "-".join(fields))
def test_a_selector_that_counts_is_found_with_its_numbers(fields):
    found, spec = asked(fields)
    assert found.fits
    assert found.spec == spec
    assert sum("is known to lie between" in note for note in found.notes) == (spec.selector in ("threshold", "top_p"))
    assert "families  none has it" in answer.text(found, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"router_dtype": "bfloat16", "score_func": "sigmoid", "route_norm": True, "route_scale": 2.5},
        {"router_dtype": "bfloat16", "score_func": "sqrtsoftplus", "logit_scale": 3.0},
        {"router_dtype": "float16", "score_over": "selected", "select_by": "logit"},
        {"router_dtype": "float16", "num_expert_groups": 4, "num_limited_groups": 2, "score_func": "sigmoid"},
        {"router_dtype": "float64", "score_func": "sigmoid", "route_scale": 2.5},
        {"router_dtype": "float64", "top_k": 8, "selector": "top_p", "top_p": 0.4},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_the_dtype_of_a_router_is_found_by_its_roundings(fields):
    found, spec = asked({"num_experts": 8} | fields)
    assert found.fits
    assert found.spec == spec


@pytest.mark.parametrize(("name", "dtype"), [("lfm2_moe", "bfloat16"), ("llama4", "float32"), ("qwen3_moe", "float32")])
def test_a_real_router_that_scores_in_bfloat16_is_told_from_one_that_rounds_its_weights_at_the_end(name, dtype):
    subject = pytest.importorskip("conformance.subjects.transformers.subject")

    class Narrow(subject.Transformers):
        logit_dtypes = ("bfloat16",)

    found = identify(Narrow(family=name), tiny(name))
    assert found.fits
    assert found.spec.router_dtype == dtype
    assert found.spec.score_func == tiny(name).score_func
    named = families_of(found)
    assert named.other_numbers[name] if dtype == "bfloat16" else name in named.exact


def test_weights_that_alone_are_rounded_are_told_from_a_router_dtype():
    class Rounded(Right):
        def route(self, logits_TE, spec, expert_bias_E):
            found = super().route(logits_TE, spec, expert_bias_E)
            weights_TK = round_to(found.weights_TK.astype(np.float64), "bfloat16")
            return Routing(expert_ids_TK=found.expert_ids_TK, weights_TK=weights_TK.astype(np.float32))

    found = identify(Rounded(), HANDED)
    assert not found.fits
    assert found.spec == DEEPSEEK
    assert any("its weights are rounded to bfloat16, and its logits are not" in note for note in found.notes)


def test_a_threshold_of_a_stranger_is_found_within_its_bounds():
    """It reads nothing of its spec, leaves slots unused with a weight that is no number, and has an odd threshold."""

    class Above(Subject):
        def route(self, logits_TE, spec, expert_bias_E):
            if expert_bias_E is not None:
                raise Unsupported("no bias here")
            scores_TE = softmax(logits_TE)
            ids_TK = top_k(scores_TE, 16)
            weights_TK = np.take_along_axis(scores_TE, ids_TK, axis=-1)
            unused_TK = weights_TK <= np.float32(0.0731)
            return Routing(
                expert_ids_TK=np.where(unused_TK, -1, ids_TK), weights_TK=np.where(unused_TK, np.nan, weights_TK)
            )

    found = identify(Above(), HANDED.replace(top_k=16))
    assert found.fits
    assert found.spec == RouterSpec(num_experts=16, top_k=16, selector="threshold", threshold=0.0731)
    assert any("threshold is known to lie between 0.0730" in note or "between 0.0731" in note for note in found.notes)


def test_a_batch_that_is_read_in_another_way_is_noted():
    class Shifted(Subject):
        def route(self, logits_TE, spec, expert_bias_E):
            ids_TK = top_k(logits_TE - logits_TE.max(axis=0), 4)
            weights_TK = np.take_along_axis(softmax(logits_TE), ids_TK, axis=-1)
            return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK)

    found = identify(Shifted(), HANDED)
    assert not found.fits
    assert any("not as selectors sinkhorn and expert_choice" in note for note in found.notes)


def test_of_the_handed_spec_the_sizes_alone_are_read():
    found = identity(Right)
    assert found.fits
    assert found.spec == DEEPSEEK
    named = families_of(found)
    assert "deepseek_v3" in named.exact
    assert named.other_numbers["kimi_linear"] == "route_scale=2.446"
    assert not named.nearest


def test_groups_of_256_experts_are_found_in_seconds():
    class Large(Right):
        top_k = 8

        def kept(self, scores_TE, choice_TE):
            groups_TG = np.sort(choice_TE.reshape(-1, 8, 32))[:, :, -2:].sum(axis=-1)
            kept_TG = np.zeros(groups_TG.shape, bool)
            np.put_along_axis(kept_TG, top_k(groups_TG, 4), True, axis=-1)
            return np.repeat(kept_TG, 32, axis=-1)

    found = identify(Large(), RouterSpec(num_experts=256, top_k=8))
    assert found.fits
    assert (found.spec.num_expert_groups, found.spec.num_limited_groups, found.spec.group_score_k) == (8, 4, 2)


def test_what_stays_open_has_a_proof_or_names_what_was_refused():
    found = identify(SelectedTwiceScaled(), HANDED)
    assert found.fits
    assert found.spec.route_scale == 0.7
    selected = [each for each in found.open if each.spec.score_over == "selected"]
    assert selected
    assert "softmax over the selected" in selected[0].why
    unproven = [each.why for each in found.open if not each.proven]
    assert unproven == [why for why in unproven if "only a bias would tell" in why or "rounding" in why]
    assert "none has it" in answer.text(found, {})


# wrong ones


def test_a_fill_of_0_is_a_spec_that_one_family_has():
    found = identity(FilledWith0)
    assert found.fits
    assert found.spec == DEEPSEEK.replace(mask_fill=0.0)
    assert families_of(found).exact == ["axk2"]


@pytest.mark.parametrize(
    ("made", "likeness"),
    [
        (BiasLeaks, "weights-of-biased-scores"),
        (Float16Scores, "rounded to float16"),
        (BestSkipped, "best-pick-skipped"),
        (GroupsWithoutBias, "group-scores-without-bias"),
        (InterleavedGroups, "interleaved-groups"),
    ],
)
def test_of_a_wrong_router_the_nearest_spec_and_the_smallest_input_are_shown(made, likeness):
    text = page(made)
    assert not identity(made).fits
    assert "It fits no spec" in text
    nearest = next(line for line in text.splitlines() if line.startswith("nearest"))
    assert "score_func=sigmoid num_expert_groups=4 num_limited_groups=2" in nearest
    assert likeness in text
    assert {"expected", "received"} <= set(text.split())


def test_the_smallest_input_of_a_leaking_bias_is_one_bias_beside_logits_of_0():
    small = smallest_difference(identity(BiasLeaks))
    assert small.title == "the weights differ"
    assert np.count_nonzero(small.case.expert_bias_E) == 1
    assert not small.case.logits_TE.any()


def test_one_expert_too_many_is_the_spec_with_another_top_k():
    found = identity(OneTooMany)
    assert found.fits
    assert found.spec == DEEPSEEK.replace(top_k=5)
    assert "another number of experts is chosen" in page(OneTooMany)


def test_a_router_like_no_spec_is_told_so():
    assert "It fits no spec" in answer.text(identify(NormedTwiceByRoot(), HANDED), {})


@pytest.mark.parametrize(
    ("ids", "why"),
    [(np.full((1, 2), 3), "twice"), (np.array([[0, 99]]), "outside"), (np.zeros((1, 2)), "not integers")],
)
def test_what_is_no_routing_is_refused(ids, why):
    class Bad(Subject):
        def route(self, logits_TE, spec, expert_bias_E):
            rows = np.repeat(ids, len(logits_TE), axis=0)
            return Routing(expert_ids_TK=rows, weights_TK=rows.astype(np.float32))

    with pytest.raises(Malformed, match=why):
        Box.opened(Bad(), HANDED)


# what is proven


def variants() -> list[RouterSpec]:
    """Specs of every kind that is asked about, and their neighbours."""
    drawn = [spec for spec in SPECS if spec.router_dtype == "float32"]
    narrow = [spec for spec in SPECS if spec.rounds]
    some = [HANDED.replace(mixer_eps=0.2), *drawn[::7], *narrow[::7], *map(tiny, FAMILIES)]
    return list(dict.fromkeys(each for spec in some for each in (spec, *alternatives(spec))))


def test_every_rule_keeps_the_routing():
    rng, seen = np.random.default_rng(0), set()
    for spec in variants():
        for biased in (False, True):
            if (biased and not spec.takes_bias) or spec.selector == "random":
                continue
            form, reasons = normal(spec, biased)
            if form == spec:
                continue
            seen |= set(reasons)
            logits_TE = rng.normal(0, 2, (6, spec.num_logits))
            bias_E = bias_of_kind("mixed", spec, rng) if biased else None
            inputs = RouterInputs.keywords(inputs_of(spec, 6, (), rng))
            found, wanted = (route(logits_TE, each, expert_bias_E=bias_E, **inputs) for each in (form, spec))
            order, other = np.argsort(found.expert_ids_TK), np.argsort(wanted.expert_ids_TK)
            take = np.take_along_axis
            assert (take(found.expert_ids_TK, order, 1) == take(wanted.expert_ids_TK, other, 1)).all(), spec
            close = np.isclose(take(found.weights_TK, order, 1), take(wanted.weights_TK, other, 1), rtol=1e-6, atol=0)
            assert close.all(), (spec, reasons)
    assert seen == {rule.sentence for rule in RULES}


def test_a_bias_tells_what_is_the_same_without_one():
    grouped = DEEPSEEK.replace(mask_fill=0.0)
    assert normal(grouped, False)[0] == normal(DEEPSEEK, False)[0]
    assert normal(grouped, True)[0] != normal(DEEPSEEK, True)[0]


def test_measured_numbers_become_those_that_people_write():
    assert near_numbers("route_scale", 2.50001, 1e-3)[0] == 2.5
    assert near_numbers("logit_scale", 0.17678, 1e-3)[0] == FAMILIES["muse_spark"].router.logit_scale
    assert near_numbers("norm_eps", 9.99e-7, 1e-2)[0] == 1e-6


def test_groupings_keep_enough_experts():
    assert all(
        each["num_limited_groups"] * (12 // each["num_expert_groups"]) >= 5
        and each["group_score_k"] <= 12 // each["num_expert_groups"]
        for each in groupings(12, 5)
    )


# the command


def run(tmp_path, source: str, *options: str) -> int:
    path = tmp_path / "router_that_is_asked.py"
    path.write_text(source)
    try:
        return main(["identify", f"{path}:Mine", *options])
    finally:
        sys.path.remove(str(tmp_path))


SOURCE = """
import numpy as np
from conformance import Routing, Subject


class Mine(Subject):
    def route(self, logits_TE, spec, expert_bias_E):
        ids_TK = np.argsort(-logits_TE, kind="stable")[:, :K]
        return Routing(expert_ids_TK=ids_TK, weights_TK=1 / (1 + np.exp(-np.take_along_axis(logits_TE, ids_TK, 1))))
"""


def test_the_command_names_the_families(tmp_path, capsys):
    assert run(tmp_path, SOURCE.replace("K]", "spec.top_k]"), "--num-experts", "16", "--top-k", "1") == 0
    text = capsys.readouterr().out
    assert "spec      num_experts=16 top_k=1 score_func=sigmoid" in text
    assert "families  kolibri1, llama4" in text


def test_the_command_fails_where_the_top_k_is_not_the_one_told(tmp_path, capsys):
    assert run(tmp_path, SOURCE.replace("K]", "spec.top_k + 1]"), "--num-experts", "8", "--top-k", "2") == 1
    assert "top_k is told to be 2; it returns 3" in capsys.readouterr().out


def test_the_command_takes_the_top_k_of_a_router_where_none_is_told(tmp_path, capsys):
    assert run(tmp_path, SOURCE.replace("K]", "3]")) == 0
    assert "spec      num_experts=8 top_k=3 score_func=sigmoid" in capsys.readouterr().out
    assert run(tmp_path, SOURCE.replace("K]", "spec.top_k + 1]")) == 1


def test_the_command_says_what_it_was_not_handed(tmp_path, capsys):
    assert run(tmp_path, "from conformance import Subject\nclass Mine(Subject):\n    def gate(self): ...\n") == 4
    assert "has no route()" in capsys.readouterr().err
    assert run(tmp_path, SOURCE, "--family", "mixtrall") == 4
    assert "mixtral" in capsys.readouterr().err
