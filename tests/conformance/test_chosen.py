"""tests of the judge: exactly the router, or the layer, that a user names is judged."""

import json
from functools import wraps
from pathlib import Path

import pytest

from conformance.core.chosen import Chosen, chosen, router_of
from conformance.core.judge import Judge
from conformance.core.register import of_stage
from conformance.core.trial import accuse
from conformance.core.usage import UsageError
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.subjects.reference import Reference
from moe_ref import ExpertSpec, LayerSpec, RouterSpec
from moe_ref.specs.families import preset

ROUTER = RouterSpec(num_experts=40, top_k=6, score_func="sigmoid", route_norm=True)
LAYER = LayerSpec(router=ROUTER, experts=ExpertSpec(dim=6, hidden_dim=10))


class Watched(Reference):
    """Keeps what it was asked."""

    def __init__(self):
        self.specs, self.sizes = set(), set()

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        self.specs.add(spec)
        self.sizes.add(len(logits_TE))
        return super().route(logits_TE, spec, expert_bias_E, **inputs)

    @wraps(Reference.layer)
    def layer(self, x_TD, params, spec, **inputs):
        self.specs.add(spec)
        self.sizes.add(len(x_TD))
        return super().layer(x_TD, params, spec, **inputs)


def test_no_other_router_and_no_other_number_of_tokens_is_judged():
    subject = Watched()
    judge = Judge(subject, chosen=Chosen(specs=(ROUTER,), tokens=33))
    assert accuse(judge, examples=6, ids=["SEL-2", "WGT-2", "SCR-2"]) == {}
    assert subject.specs == {ROUTER}
    assert subject.sizes <= {33, 1}
    assert judge.ledger["SEL-2"].judged > 0


def test_a_layer_is_judged_with_its_router():
    subject = Watched()
    judge = Judge(subject, chosen=Chosen(specs=(ROUTER, LAYER)))
    assert accuse(judge, examples=4, ids=["SEL-2", *of_stage("layer")]) == {}
    assert subject.specs == {ROUTER, LAYER}


def test_a_family_is_judged_at_its_published_size_with_other_values_where_they_are_given():
    assert router_of(["deepseek_v3"]) == preset("deepseek_v3")
    found = router_of(["deepseek_v3", "num_experts=384", "num_expert_groups=none,num_limited_groups=none"])
    assert (found.num_experts, found.num_expert_groups, found.top_k) == (384, None, 8)
    assert router_of(["mixtral", "route_norm=false", "score_func=sigmoid"]).route_norm is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deepseek_v33"], "unknown family 'deepseek_v33' (did you mean deepseek_v3?)"),
        (["mixtral", "num_expert=4"], "unknown field 'num_expert' of RouterSpec (did you mean num_experts?)"),
        (["mixtral", "num_experts"], "'num_experts' is no override; it is field=value"),
        (["mixtral", "num_experts=many"], "num_experts is 'many'; it is an integer"),
        (["mixtral", "top_k=9"], "top_k is 9"),
    ],
)
def test_what_is_no_router_is_a_usage_error(words, message):
    with pytest.raises(UsageError) as raised:
        router_of(words)
    assert message in str(raised.value)


def test_a_file_holds_a_router_or_a_layer(tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(ROUTER.to_dict()))
    assert chosen(file=file) == Chosen(specs=(ROUTER,))
    file.write_text(json.dumps(LAYER.to_dict()))
    assert chosen(file=file, tokens=5) == Chosen(specs=(ROUTER, LAYER), tokens=5)
    narrow = chosen(file=file, width=[4, 8])
    assert narrow is not None
    assert narrow.specs[1] == LAYER.replace(experts=ExpertSpec(dim=4, hidden_dim=8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "it is no JSON object"),
        ('{"num_experts": 8, "topk": 2}', "unknown field 'topk' of RouterSpec (did you mean top_k?)"),
        ('{"router": {"num_experts": 8, "top_k": 2}}', "LayerSpec needs experts"),
    ],
)
def test_a_file_that_holds_none_is_a_usage_error_that_names_it(tmp_path, text, message):
    file = tmp_path / "spec.json"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        chosen(file=file)
    assert f"spec {file}: " in str(raised.value)
    assert message in str(raised.value)


def test_options_that_do_not_belong_together_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="belong to --family or --spec"):
        chosen(tokens=5)
    with pytest.raises(UsageError, match="not both"):
        chosen(family=["mixtral"], file=Path("spec.json"))
    with pytest.raises(UsageError, match="take 504 GiB in float64, more than 2; --width"):
        chosen(family=["deepseek_v3"], width=[7168, 12288])
    with pytest.raises(UsageError, match=r"spec nowhere\.json: No such file"):
        chosen(file=Path("nowhere.json"))
