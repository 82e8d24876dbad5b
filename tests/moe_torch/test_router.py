"""moe_torch, tests of the router: equal to moe_ref in every stage, in float64, float32 and under torch.compile."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ref
from moe_ref import UNUSED, RouterInputs, RouterSpec, gate
from moe_torch.router import NodeLimitedRouter
from moe_torch.routing import route
from moe_torch.selection import _top_k_of_keys, top_k

NORMED: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20, "route_scale": 2.5}
GROUPS: dict[str, Any] = {"num_experts": 24, "top_k": 5, "num_expert_groups": 6, "num_limited_groups": 3}
PLAIN: dict[str, Any] = {"num_experts": 13, "top_k": 4}
SELECTED: dict[str, Any] = {"score_over": "selected", "select_by": "logit"}
SHARED: dict[str, Any] = {"score_func": "sigmoid", "num_scored_shared_experts": 3}

SPECS = [
    RouterSpec.from_dict(fields)
    for fields in (
        PLAIN,
        PLAIN | NORMED,
        PLAIN | {"top_k": 13, "score_func": "sqrtsoftplus", "route_norm": True},
        PLAIN | {"top_k": 1, "score_func": "sigmoid", "logit_scale": 0.3, "logit_softcap": 2.0},
        PLAIN | {"score_func": "sigmoid", "select_by": "logit"},
        PLAIN | SELECTED | {"logit_scale": 2.0, "route_norm": True},
        PLAIN | {"route_norm": True, "norm_form": "clamp", "norm_eps": 0.5},
        PLAIN | {"route_norm": True, "norm_p": 2.0, "norm_eps": 1e-3},
        PLAIN | {"score_func": "sigmoid", "route_norm": True, "norm_p": 0.5},
        PLAIN | NORMED | {"learned_scale": "per_expert"},
        PLAIN | NORMED | SHARED | {"learned_scale": "global"},
        PLAIN | SHARED | {"norm_with_shared": True, "route_norm": True, "route_scale": 3.0},
        PLAIN | {"num_null_experts": 4, "learned_scale": "per_expert"},
        PLAIN | {"num_null_experts": 4, "null_kind": "skip", "route_norm": True},
        PLAIN | {"num_null_experts": 4, "num_zero_experts": 2, "route_norm": True},
        PLAIN | NORMED | {"selector": "table"},
        PLAIN | NORMED | {"selector": "given"},
        PLAIN | SELECTED | {"selector": "given"},
        PLAIN | {"selector": "round_robin"},
        PLAIN | {"selector": "sparsemixer", "select_by": "logit", "mixer_eps": 0.2},
        PLAIN | NORMED | {"selector": "expert_choice", "top_k": PLAIN["num_experts"], "take_factor": 3.0},
        GROUPS | NORMED,
        GROUPS | NORMED | {"group_score_k": 1, "top_k": 9},
        GROUPS | {"group_score_k": 4, "score_func": "sqrtsoftplus"},
        GROUPS | {"group_score_k": 1, "mask_fill": 0.0, "weights_from": "masked_scores"},
        GROUPS | {"score_func": "sigmoid", "mask_fill": 0.0},
        GROUPS | SELECTED | {"num_limited_groups": 6},
        GROUPS | NORMED | {"num_expert_groups": 24, "num_limited_groups": 7, "group_score_k": 1},
        PLAIN | {"top_k": 13, "score_func": "relu", "selector": "threshold"},
        PLAIN | NORMED | {"selector": "threshold", "threshold": 0.5},
        PLAIN | {"top_k": 6, "selector": "top_p", "top_p": 0.7, "route_norm": True},
    )
]
ids_of = [",".join(f"{k}={v}" for k, v in spec.to_dict().items()) for spec in SPECS]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=ids_of)


def inputs_of(spec: RouterSpec, T: int, seed: int) -> dict:
    """The inputs of moe_ref.route that a spec needs, of float32 values."""
    rng = np.random.default_rng(seed)
    E, K = spec.num_choices, spec.top_k
    found = {"logits_TE": rng.normal(size=(T, spec.num_logits)) * 2}
    if spec.takes_bias:
        # Where dropped experts rank as 0, kept ones are below 0 too: some dropped ones are chosen.
        found["expert_bias_E"] = rng.normal(size=E) * 0.2 - (0.3 if spec.mask_fill == 0 else 0)
    if spec.learned_scale != "none":
        found["learned_scale"] = rng.uniform(0.5, 2, size=E if spec.learned_scale == "per_expert" else ())
    found = {name: np.asarray(value, np.float32).astype(np.float64) for name, value in found.items()}
    permuted_RE = rng.permuted(np.tile(np.arange(E), (T + 5, 1)), axis=-1)
    if spec.selector == "table":
        found |= {"table_VK": permuted_RE[:5, :K], "token_ids_T": rng.integers(0, 5, T)}
    if spec.selector == "given":
        found["given_ids_TK"] = np.where(rng.random((T, K)) < 0.2, UNUSED, permuted_RE[5:, :K])
    return found


def to_torch(inputs: dict, dtype=torch.float64) -> dict:
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def run(spec: RouterSpec, inputs: dict, dtype=torch.float64):
    tensors = to_torch(inputs, dtype)
    return route(tensors.pop("logits_TE"), spec, **RouterInputs.keywords(tensors))


def reference_route(*logits_and_spec, **named):
    return moe_ref.route(*logits_and_spec, **RouterInputs.keywords(named))


def assert_equal(found, expected, rtol: float, atol: float = 0.0):
    """Ids are equal, and so is what else both traces hold; a stage is absent from both or from neither."""
    np.testing.assert_array_equal(found.expert_ids_TK.numpy(), expected.expert_ids_TK)
    assert found.expert_ids_TK.dtype == torch.int64
    for name in ("weights_TK", "scores_TE", "scores_for_choice_TE", "group_scores_TG", "group_ids_TL",
                 "shared_weights_TS"):  # fmt: skip
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=rtol, atol=atol, err_msg=name)


@every_spec
@pytest.mark.parametrize("T", [0, 1, 37])
def test_every_stage_equals_the_reference(spec, T):
    inputs = inputs_of(spec, T, seed=T)
    assert_equal(run(spec, inputs), reference_route(spec=spec, **inputs), rtol=1e-12)


@every_spec
def test_float32_logits_are_computed_in_float32(spec):
    inputs = inputs_of(spec, 29, seed=3)
    found = run(spec, inputs, torch.float32)
    # A chain of ten roundings of 2**-24 each; sums of choice scores cancel, hence the absolute term.
    assert_equal(found, reference_route(spec=spec, **inputs), rtol=2e-6, atol=5e-7)
    assert found.weights_TK.dtype == torch.float32


@every_spec
def test_padding_rows_are_not_read(spec):
    inputs = inputs_of(spec, 23, seed=4)
    mask_T = np.random.default_rng(5).random(23) < 0.6
    expected = reference_route(spec=spec, token_mask_T=mask_T, **inputs)
    inputs["logits_TE"] = np.where(mask_T[:, None], inputs["logits_TE"], np.nan)
    if "token_ids_T" in inputs:
        inputs["token_ids_T"] = np.where(mask_T, inputs["token_ids_T"], -100)
    assert_equal(run(spec, inputs | {"token_mask_T": mask_T}), expected, rtol=1e-12)


@every_spec
def test_a_logit_of_minus_infinity_is_never_chosen(spec):
    inputs = inputs_of(spec, 31, seed=6)
    # One expert in four, so that enough are left of every group.
    hidden_TE = np.random.default_rng(7).random(inputs["logits_TE"].shape) < 0.6
    hidden_TE &= (np.arange(spec.num_logits) % 4 == 1) & (spec.top_k < spec.num_choices)
    inputs["logits_TE"] = np.where(hidden_TE, -np.inf, inputs["logits_TE"])
    assert_equal(run(spec, inputs), reference_route(spec=spec, **inputs), rtol=1e-12)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_ties_go_to_the_lower_id(spec, dtype):
    inputs = inputs_of(spec, 64, seed=8)
    rng = np.random.default_rng(9)
    inputs["logits_TE"] = rng.choice([-1.0, -0.0, 0.0, 2.0], size=inputs["logits_TE"].shape)
    inputs["logits_TE"][::4] = 0.5
    inputs.pop("expert_bias_E", None)
    expected = reference_route(spec=spec, **inputs)
    found = run(spec, inputs, dtype)
    if spec.group_score_k > 2:  # sums of more than two scores round: groups tie in one order of addition only
        assert found.group_ids_TL is not None
        found_rows = (found.group_ids_TL.numpy() == expected.group_ids_TL).all(-1)
        assert found_rows.mean() > 0.5
    else:
        np.testing.assert_array_equal(found.expert_ids_TK.numpy(), expected.expert_ids_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choose", [top_k, _top_k_of_keys])
def test_top_k_ranks_every_lattice_row_like_a_stable_sort(choose, dtype):
    levels = (-np.inf, -2.5, -0.0, 0.0, 1e-30)
    scores_TE = np.array(list(itertools.product(levels, repeat=5)))
    expected_TE = np.argsort(-scores_TE, axis=-1, kind="stable")
    for k in range(1, 6):
        np.testing.assert_array_equal(choose(torch.from_numpy(scores_TE).to(dtype), k).numpy(), expected_TE[:, :k])


def test_a_slot_with_nothing_left_to_choose_is_unused():
    for fields in (PLAIN | NORMED, GROUPS | NORMED, PLAIN | {"selector": "sparsemixer", "select_by": "logit"}):
        spec = RouterSpec.from_dict(fields)
        logits_TE = torch.full((1, spec.num_experts), -torch.inf)
        logits_TE[0, 6:8] = torch.tensor([1.0, 2.0])
        found = route(logits_TE, spec)
        assert found.expert_ids_TK[0].tolist() == [7, 6] + [UNUSED] * (spec.top_k - 2)
        assert found.weights_TK[0, 2:].eq(0).all()
        assert found.weights_TK[0, :2].gt(0).all()


def test_random_choices_are_distinct_and_repeat_with_the_generator():
    spec = RouterSpec(**PLAIN, selector="random")
    first, again = (
        route(torch.zeros(50, 13), spec, inputs=RouterInputs(seed=torch.Generator().manual_seed(1))) for _ in range(2)
    )
    assert torch.equal(first.expert_ids_TK, again.expert_ids_TK)
    assert all(len(set(row)) == 4 for row in first.expert_ids_TK.tolist())
    assert len(first.expert_ids_TK.unique()) == 13


@every_spec
def test_gradients_equal_finite_differences_of_the_reference(spec):
    inputs = inputs_of(spec, 4, seed=10)
    rng = np.random.default_rng(11)
    tensors = to_torch(inputs)
    floats = {n: t.requires_grad_() for n, t in tensors.items() if n in ("logits_TE", "learned_scale", "expert_bias_E")}
    found = route(tensors.pop("logits_TE"), spec, **RouterInputs.keywords(tensors))
    upstream_TK = rng.normal(size=found.weights_TK.shape)
    upstream_TS = rng.normal(size=(4, spec.num_scored_shared_experts))
    loss = (found.weights_TK * torch.from_numpy(upstream_TK)).sum()
    if found.shared_weights_TS is not None:
        loss = loss + (found.shared_weights_TS * torch.from_numpy(upstream_TS)).sum()
    grads = torch.autograd.grad(loss, list(floats.values()), allow_unused=True)

    def loss_of(changed: dict) -> float:
        trace = reference_route(spec=spec, **changed)
        np.testing.assert_array_equal(trace.expert_ids_TK, found.expert_ids_TK)  # no step of the choice is crossed
        shared = 0 if trace.shared_weights_TS is None else (trace.shared_weights_TS * upstream_TS).sum()
        return float((trace.weights_TK * upstream_TK).sum() + shared)

    for name, grad in zip(floats, grads, strict=True):
        if name == "expert_bias_E":
            assert grad is None
            continue
        direction = rng.normal(size=inputs[name].shape)
        step = 1e-6
        ahead, behind = (loss_of(inputs | {name: inputs[name] + s * direction}) for s in (step, -step))
        # The error of a central difference here: step**2 of truncation and 1e-16 / step of rounding.
        expected, given = (
            (ahead - behind) / (2 * step),
            0.0 if grad is None else float((grad.numpy() * direction).sum()),
        )
        np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-8, err_msg=name)


@every_spec
@pytest.mark.parametrize("level", [0.0, -40.0, -87.9, -88.6, -150.0, -1e4, 1e4])
def test_gradients_are_finite_where_scores_saturate_vanish_or_are_masked(spec, level):
    inputs = to_torch(inputs_of(spec, 6, seed=12), torch.float32)
    logits_TE = inputs.pop("logits_TE") * 0.01 + level
    logits_TE[1, 3:] = -torch.inf
    logits_TE[2] = -torch.inf
    logits_TE[3] = torch.nan
    logits_TE.requires_grad_()
    mask_T = torch.tensor([True, True, True, False, True, True])
    found = route(logits_TE, spec, token_mask_T=mask_T, **RouterInputs.keywords(inputs))
    shared = 0 if found.shared_weights_TS is None else found.shared_weights_TS.sum()
    upstream_TK = torch.linspace(-1, 3, spec.top_k)
    loss = (found.weights_TK * upstream_TK).sum() + shared
    assert loss.isfinite()
    if not loss.requires_grad:
        return
    loss.backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad[3].eq(0).all()


def assert_compiled_equals_eager(spec: RouterSpec, backend: str, *, sizes) -> None:
    torch._dynamo.reset()

    def weights_and_gradient(function, tensors):
        logits_TE = tensors["logits_TE"].clone().requires_grad_()
        others = {name: value for name, value in tensors.items() if name != "logits_TE"}
        found = function(logits_TE, spec, **others)
        if found.weights_TK.requires_grad:
            found.weights_TK.square().sum().backward()
        return found, logits_TE.grad

    compiled = torch.compile(route, fullgraph=True, backend=backend)
    for T, tied in sizes:
        inputs = inputs_of(spec, T, seed=13)
        if tied:
            inputs["logits_TE"] = np.round(inputs["logits_TE"])
            inputs.pop("expert_bias_E", None)
            inputs["logits_TE"][0] = 0.0
        tensors = to_torch(inputs, torch.float32)
        eager, eager_grad = weights_and_gradient(route, tensors)
        found, grad = weights_and_gradient(compiled, tensors)
        np.testing.assert_array_equal(found.expert_ids_TK, eager.expert_ids_TK)
        # inductor takes other roundings of exp
        torch.testing.assert_close(found.weights_TK, eager.weights_TK, rtol=2e-6, atol=1e-7)
        if eager_grad is not None:
            torch.testing.assert_close(grad, eager_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS[::9], ids=ids_of[::9])
def test_one_graph_holds_the_whole_route(spec):
    assert_compiled_equals_eager(spec, "aot_eager", sizes=((33, False), (65, True)))


def test_sinkhorn_is_one_operator_of_a_graph():
    seen, spec = [], RouterSpec(num_experts=8, top_k=2, selector="sinkhorn", select_by="logit")

    def count(graph, _):
        seen.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    logits_TE, mask_T = torch.randn(40, 8, generator=torch.manual_seed(0)), torch.arange(40) % 5 > 0
    with torch.no_grad():
        found = torch.compile(route, fullgraph=True, backend=count)(logits_TE, spec, token_mask_T=mask_T)
    (targets,) = seen
    assert targets.count(torch.ops.moe_torch.even_experts.default) == 1
    assert len(targets) < 60
    wanted = route(logits_TE, spec, token_mask_T=mask_T)
    np.testing.assert_array_equal(found.expert_ids_TK, wanted.expert_ids_TK)
    torch.testing.assert_close(found.weights_TK, wanted.weights_TK, rtol=0, atol=0)


def test_inductor_code_equals_eager():
    # One size and no backward pass: each costs seconds of C++ compiler.
    with torch.no_grad():
        assert_compiled_equals_eager(RouterSpec(**GROUPS, **NORMED), "inductor", sizes=((65, True),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_routed_in_float32_also_under_autocast(dtype):
    spec = RouterSpec(**GROUPS | {"score_func": "softmax", "route_norm": True, "norm_p": 2.0})
    inputs = inputs_of(spec, 41, seed=14)
    logits_TE = torch.from_numpy(inputs["logits_TE"]).to(dtype)
    bias_E = torch.from_numpy(inputs["expert_bias_E"]).float()
    exact_TE = logits_TE.double().numpy()
    expected = reference_route(exact_TE, spec, expert_bias_E=inputs["expert_bias_E"])
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = route(logits_TE, spec, expert_bias_E=bias_E)
        assert found.weights_TK.dtype == torch.float32
        assert_equal(found, expected, rtol=2e-6, atol=5e-7)


def test_the_module_routes_what_its_gate_computes():
    spec = RouterSpec(**GROUPS, **NORMED)
    torch.manual_seed(0)
    router = NodeLimitedRouter(7, spec, gate_bias=True)
    assert router.expert_bias is not None
    with torch.no_grad():
        router.expert_bias.normal_(std=0.2)
    x = torch.randn(3, 5, 7)
    mask = torch.rand(3, 5) < 0.7
    weights, ids, scores = router(x, token_mask=mask)
    assert weights.shape == ids.shape == (3, 5, spec.top_k)
    assert scores is not None
    assert scores.shape == (3, 5, spec.num_experts)
    logits_TE = gate(x.reshape(-1, 7).numpy(), router.gate.weight.detach().numpy(), router.gate.bias.detach().numpy())
    expected = reference_route(
        logits_TE, spec, expert_bias_E=router.expert_bias.numpy(), token_mask_T=mask.flatten().numpy()
    )
    np.testing.assert_array_equal(ids.flatten(0, 1).numpy(), expected.expert_ids_TK)
    np.testing.assert_allclose(weights.flatten(0, 1).detach().numpy(), expected.weights_TK, rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (0,), (4, 0), (2, 3, 2)])
def test_the_module_keeps_any_leading_shape(lead):
    router = NodeLimitedRouter(7, RouterSpec(**PLAIN))
    weights, ids, scores = router(torch.randn(*lead, 7))
    assert scores is not None
    assert (weights.shape, ids.shape, scores.shape) == ((*lead, 4), (*lead, 4), (*lead, 13))


def test_the_balancing_bias_stays_float32_and_exact_in_a_bfloat16_module():
    router = NodeLimitedRouter(7, RouterSpec(**GROUPS, **NORMED))
    assert router.expert_bias is not None
    router.expert_bias.fill_(0.5 + 1e-3)
    router.to(torch.bfloat16)
    assert router.gate.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32
    assert router.expert_bias.eq(torch.tensor(0.5 + 1e-3)).all()
    assert "expert_bias" in router.state_dict()
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        weights, _, _ = router(torch.randn(2, 7, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32


def test_the_gate_computes_in_float32_under_autocast():
    router = NodeLimitedRouter(64, RouterSpec(**PLAIN))
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE = router.gate(x)
    assert torch.equal(logits_TE, router.gate(x))


def test_reset_parameters_forgets_the_bias_and_the_scale():
    router = NodeLimitedRouter(7, RouterSpec(**PLAIN, learned_scale="global"))
    assert router.expert_bias is not None
    assert router.learned_scale is not None
    before = router.gate.weight.detach().clone()
    with torch.no_grad():
        router.expert_bias.fill_(3)
        router.learned_scale.fill_(3)
    router.reset_parameters()
    assert router.expert_bias.eq(0).all()
    assert router.learned_scale.eq(1).all()
    assert not torch.equal(before, router.gate.weight)


class Passes(TorchDispatchMode):
    """Counts the operators whose arrays are so large that PyTorch shares them out among its threads."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        tensors = [value for value in (*args, found) if isinstance(value, torch.Tensor)]
        self.count += not operator.is_view and max((value.numel() for value in tensors), default=0) >= 2**15
        return found


def test_a_router_waits_for_all_threads_some_thirty_times():
    # Where another process has one of two cores, it is this number that takes long.
    spec = RouterSpec(**NORMED, num_experts=256, top_k=8, num_expert_groups=8, num_limited_groups=4)
    logits_TE = torch.randn(8192, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Passes() as passes:
        route(logits_TE, spec, expert_bias_E=torch.zeros(256))
    assert passes.count <= 30


def test_errors_name_field_value_and_bound():
    spec = RouterSpec(**PLAIN)
    with pytest.raises(ValueError, match=r"logits_TE has shape \(3, 12\); it is \(any, 13\)"):
        route(torch.zeros(3, 12), spec)
    with pytest.raises(ValueError, match=r"logits_TE has dtype torch\.int64; it is float"):
        route(torch.zeros(3, 13, dtype=torch.int64), spec)
    with pytest.raises(ValueError, match="given_ids_TK is given, but selector 'top_k' takes none"):
        route(torch.zeros(3, 13), spec, inputs=RouterInputs(given_ids_TK=torch.zeros(3, 4, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"learned_scale is None; the spec's is 'per_expert'"):
        route(torch.zeros(3, 13), spec.replace(learned_scale="per_expert"))
    with pytest.raises(ValueError, match="expert_bias_E is given, but selector 'round_robin' takes none"):
        route(torch.zeros(3, 13), spec.replace(selector="round_robin"), expert_bias_E=torch.zeros(13))
    with pytest.raises(ValueError, match="dim is 0; it is an integer of at least 1"):
        NodeLimitedRouter(0, spec)
