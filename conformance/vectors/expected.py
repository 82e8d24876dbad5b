"""conformance, vectors: what a call returns, and how far float32 may be from it.

The values are those of moe_ref in float64, rounded to a grid that is a sixteenth to an eighth of the tolerance, so that
the last bits of a machine's exp and matrix products are not in them. Tolerances are the bounds of the judge for
float32, plus what this rounding does, to four bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.balance.bounds import bias_radius, loss_radius, weight_gradient_radius, weights_radius, z_loss_radius
from conformance.balance.case import BalanceCase, BatchSpec
from conformance.core.judge import Judge
from conformance.core.rounding import EPSILON
from conformance.layer import bounds as layer_bounds
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import radius_of_experts, sums_ball
from conformance.router.bounds import (
    ROUNDINGS,
    choice_error,
    edges,
    score_error,
    score_floor,
    taken_clearly_T,
    weight_error,
    weight_floor,
)
from conformance.router.case import RouterCase
from conformance.router.varying import settled_T
from conformance.sharded.case import ShardedCase
from conformance.sharded.verdicts import radii_of_gradients, radius_of_outputs
from conformance.subjects.reference import Reference
from conformance.training import verdicts as training
from conformance.training.case import MARGIN, TrainingCase
from conformance.vectors.calls import Call, by_name, made
from conformance.vectors.container import packed, settled
from moe_ref import LayerParams, gate
from moe_ref.specs.params import FeedForward
from moe_ref.specs.upcycle import upcycle

GRID = 3
"""Bits of a tolerance below which a value has none."""
TOLERANCE_BITS = 4
DOUBT = 2.0**-20
"""So near, in steps, to the middle of two values of the grid a machine's last bits may decide between them."""
NOISE = 2.0**-30
"""More than float64 can be off from machine to machine, relative to the number."""

Tensors = dict[str, np.ndarray]


class Unclear(Exception):
    """A call whose result float32 does not determine, or whose stored bytes could differ from machine to machine."""


class Oracle(Reference):
    """moe_ref in float64."""

    compute_dtype = "float64"


ORACLE, JUDGE = Oracle(), Judge(Reference())


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What a call returns."""

    json: Any
    """The form of what returns, with names in place of arrays; None: the call is refused."""
    values: Tensors
    tolerances: Tensors
    """By the name of a value; one that has none is met exactly."""
    same: dict[str, str]
    """A value that is another one over again, as a rank's gradient is; it is stored under that name."""
    tied: bool
    """Whether equal scores decide: then the lower id wins, which is a SHOULD."""


def expected(call: Call) -> Expected:
    """What the call returns.

    Raises:
        Unclear: another result would be right as well.
    """
    arguments = {name: _wide(value) for name, value in call.arguments.items()}
    try:
        with np.errstate(all="ignore"):
            returned = made(ORACLE, call.method, arguments)
    except ValueError as error:
        if call.method == "configure":
            return Expected(json=None, values={}, tolerances={}, same={}, tied=False)
        raise Unclear("the reference refuses it") from error
    values: Tensors = {}
    form = packed(by_name(call.method, returned), "", values)
    if not all(np.isfinite(value).all() for value in values.values()):
        raise Unclear("a value is not finite")
    with np.errstate(all="ignore"):
        radii, tied = RADII.get(call.method, _exact)(arguments)
    wide: Tensors = {}
    packed_values = by_name(call.method, returned)
    _flat(packed_values, "", wide)
    found, tolerances, same = {}, {}, {}
    for name, value in values.items():
        tolerance = np.zeros(value.shape)
        if value.dtype.kind == "f":
            if name not in radii:
                raise Unclear(f"how far rounding reaches in {call.method}() is not known here")
            radius = np.broadcast_to(np.asarray(radii[name], dtype=np.float64), value.shape)
            value, tolerance = on_grid(wide[name], radius)
        value, tolerance = settled(value), settled(tolerance)
        first = next((other for other in found if alike(found[other], value)
                      and alike(tolerances.get(other, np.zeros_like(tolerance)), tolerance)), None)  # fmt: skip
        if first is not None and value.size > 1:
            same[name] = first
            continue
        found[name] = value
        if tolerance.any():
            tolerances[name] = tolerance
    return Expected(json=form, values=found, tolerances=tolerances, same=same, tied=tied)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have the same bytes in the same form."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def on_grid(value: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values on their grid, and the tolerances that they are met within.

    Raises:
        Unclear: a value is in the middle between two, as far as float64 can tell.
    """
    value = np.asarray(value, dtype=np.float64)
    if not np.isfinite(radius).all():
        raise Unclear("a bound is not finite")
    held = np.where(radius > 0, radius, 1)
    step = 2.0 ** (np.floor(np.log2(held * (1 + NOISE))) - GRID)
    steps = value / step
    if ((np.abs(steps - np.floor(steps) - 0.5) < DOUBT) & (radius > 0)).any():
        raise Unclear("a value is in the middle between two of the grid")
    rounded = np.where(radius > 0, np.round(steps) * step, value) + 0.0
    wanted = held + step / 2
    unit = 2.0 ** (np.floor(np.log2(wanted * (1 + NOISE))) - TOLERANCE_BITS + 1)
    return rounded, np.where(radius > 0, np.ceil(wanted / unit * (1 - NOISE)) * unit, 0)


def _wide(value: Any) -> Any:
    """Floats in float64, as the cases of the judge have them."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64) if value.dtype.kind == "f" else value
    if isinstance(value, LayerParams):
        return value.astype(np.float64)
    return [_wide(each) for each in value] if isinstance(value, list) else value


def _flat(value: Any, path: str, found: Tensors) -> None:
    """Name -> array, in the names of `packed` and the dtype that it came in."""
    if isinstance(value, np.ndarray):
        found[path] = value
    else:
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, each in pairs:
            _flat(each, f"{path}.{name}" if path else str(name), found)


# how far float32 may be off, by method: the radius of each value by name, and whether equal scores decide

Radii = tuple[Mapping[str, Any], bool]
DTYPE = "float32"


def _exact(arguments: dict[str, Any]) -> Radii:
    return {}, False


def _gate(arguments: dict[str, Any]) -> Radii:
    x_TD, gate_ED = arguments["x_TD"], arguments["gate_ED"]
    bias_E = arguments.get("gate_bias_E")
    size_TE = gate(np.abs(x_TD), np.abs(gate_ED), None if bias_E is None else np.abs(bias_E))
    return {"logits_TE": 2 * (x_TD.shape[1] + 1) * EPSILON[DTYPE] * size_TE}, False


def _route(arguments: dict[str, Any]) -> Radii:
    case = router_case(arguments)
    trace, spec = case.reference, case.spec
    tied = hold_clear(case)
    error_TK = weight_error(case, trace.expert_ids_TK, DTYPE)
    floor_T1 = weight_floor(case, trace.expert_ids_TK, trace.weights_TK, DTYPE)
    if spec.selector == "sparsemixer":
        size = np.abs(case.logits_TE).max(initial=0)
        error_TK, floor_T1 = EPSILON[DTYPE] * (ROUNDINGS + 4 * size), 1e-30
    found = {"weights_TK": error_TK * np.abs(trace.weights_TK) + floor_T1}
    if trace.scores_TE is not None:
        found["scores_TE"] = score_error(case, DTYPE) * trace.scores_TE + score_floor(case, DTYPE)
    if trace.shared_weights_TS is not None:
        size = np.abs(np.nan_to_num(case.logits_TE, neginf=0.0)).max(initial=0)
        found["shared_weights_TS"] = 4 * EPSILON[DTYPE] * (ROUNDINGS + size) * trace.shared_weights_TS + 1e-30
    return found, tied


def router_case(arguments: Mapping[str, Any]) -> RouterCase:
    """The case of a call of `route`."""
    inputs = {name: value for name, value in arguments.items() if name not in ("logits_TE", "spec", "expert_bias_E")}
    return RouterCase(
        spec=arguments["spec"],
        logits_TE=arguments["logits_TE"],
        expert_bias_E=arguments.get("expert_bias_E"),
        inputs=inputs,
    )


def hold_clear(case: RouterCase) -> bool:
    """Whether equal scores decide which experts a token gets.

    Raises:
        Unclear: scores that are not equal decide, but float32 need not tell them apart; or the choice is random.
    """
    spec = case.spec
    if spec.selector == "random":
        raise Unclear("its choice is random")
    if spec.selector == "expert_choice" and not taken_clearly_T(case, choice_error(case, DTYPE)).all():
        raise Unclear("its choice hangs on rounding")
    if not (spec.selector == "top_k" or spec.varies) or case.num_tokens == 0:
        return False
    trace, error_TE = case.reference, choice_error(case, DTYPE)
    if spec.varies:
        if not (settled_T(case, error_TE) | ~case.valid_T).all():
            raise Unclear("its choice hangs on rounding")
        return False
    choice_TE = trace.scores_for_choice_TE
    assert choice_TE is not None
    chosen_TE = np.zeros(error_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, np.maximum(trace.expert_ids_TK, 0), True, axis=-1)
    worst_in_T, best_out_T = edges(chosen_TE, choice_TE - error_TE, choice_TE + error_TE)
    equal_T = np.equal(*edges(chosen_TE, choice_TE, choice_TE))
    groups_T = layer_bounds.stable_groups_T(case, error_TE, DTYPE)
    wrong_T = case.valid_T & ~(groups_T & ((worst_in_T > best_out_T) | equal_T))
    if wrong_T.any():
        raise Unclear("its choice hangs on rounding")
    return bool((equal_T & case.valid_T).any())


def layer_case(arguments: Mapping[str, Any], **changes: Any) -> LayerCase:
    """The case of a call with a whole layer."""
    own = ("x_TD", "params", "spec", "d_output_TD", "record", "rows_RD", "tokens_per_expert_E")
    x_TD = arguments["x_TD"]
    found: dict[str, Any] = {
        "spec": arguments["spec"],
        "params": arguments["params"],
        "x_TD": x_TD,
        "d_output_TD": arguments.get("d_output_TD", np.zeros_like(x_TD)),
        "inputs": {name: value for name, value in arguments.items() if name not in own},
    }
    return LayerCase(**(found | changes))


def _clear(case: LayerCase) -> LayerCase:
    if case.spec.router.selector == "random":
        raise Unclear("its choice is random")
    if not layer_bounds.stable_T(case, DTYPE).all():
        raise Unclear("its choice hangs on rounding")
    return case


def _layer(arguments: dict[str, Any]) -> Radii:
    if arguments.get("batch_invariant"):
        raise Unclear("the same bits in any batch are nothing that a rounded number shows")
    case = _clear(layer_case(arguments))
    return {"output_TD": layer_bounds.layer(case, DTYPE, DTYPE).output_TD.radius}, False


def _fused_layer(arguments: dict[str, Any]) -> Radii:
    radii, tied = _layer(arguments)
    return {"0": 2 * radii["output_TD"]}, tied  # the slots of shared experts are rounded as routed ones are


def _upcycled_layer(arguments: dict[str, Any]) -> Radii:
    dense, spec = FeedForward(**arguments["dense"]), arguments["spec"]
    case = layer_case({"x_TD": arguments["x_TD"], "params": upcycle(dense, spec, gate_std=1.0), "spec": spec})
    # The output is the dense one whatever the rows of the gate are; the factor on the down projection is rounded.
    return {"output_TD": 2 * layer_bounds.layer(case, DTYPE, DTYPE).output_TD.radius}, False


def _layer_gradients(arguments: dict[str, Any]) -> Radii:
    case = _clear(layer_case(arguments))
    balls = layer_bounds.gradients(case, DTYPE, DTYPE)
    return {name: ball.radius for name, ball in balls.items()} | {"expert_bias_E": 0}, False


def _record(arguments: dict[str, Any]) -> Radii:
    case = _clear(layer_case(arguments))
    weights_TK = layer_bounds.layer(case, DTYPE, DTYPE).weights_TK
    return {"weights_TK": weights_TK.radius + EPSILON[DTYPE] * np.abs(weights_TK.centre)}, False


def _replay(arguments: dict[str, Any]) -> Radii:
    record, spec = arguments["record"], arguments["spec"]
    given, mask_T = record.inputs(spec.router, with_weights=record.weights_TK is not None)
    router = spec.router.given(with_weights=record.weights_TK is not None)
    inputs = {"given_ids_TK": given.given_ids_TK.astype(np.int64), "token_mask_T": mask_T}
    if given.given_weights_TK is not None:
        inputs["given_weights_TK"] = given.given_weights_TK.astype(np.float64)
    case = layer_case(arguments, spec=spec.replace(router=router), inputs=inputs).with_params(expert_bias_E=None)
    return {"output_TD": layer_bounds.layer(case, DTYPE, DTYPE).output_TD.radius}, False


def _of_nothing(arguments: dict[str, Any], params: LayerParams) -> LayerCase:
    return layer_case(
        {"x_TD": np.zeros((0, arguments["spec"].experts.dim)), "spec": arguments["spec"], "params": params}
    )


def _experts(arguments: dict[str, Any]) -> Radii:
    rows_RD, counts_E = arguments["rows_RD"], arguments["tokens_per_expert_E"]
    used = int(counts_E.sum())
    radius_RD = np.zeros(rows_RD.shape)
    radius_RD[:used] = radius_of_experts(JUDGE, _of_nothing(arguments, arguments["params"]), rows_RD[:used], counts_E)
    return {"output_RD": radius_RD}, False


def _combine(arguments: dict[str, Any]) -> Radii:
    case = _of_nothing(arguments, LayerParams.init(arguments["spec"], 0))
    ball = sums_ball(JUDGE, case, arguments["rows_ND"], arguments["order_N"], arguments["weights_TK"])
    return {"output_TD": ball.radius}, False


def sharded_case(arguments: Mapping[str, Any]) -> ShardedCase:
    """The case of a call with a layout."""
    by_shard = {name: value for name, value in arguments.items() if name.endswith("_by_shard")}
    rows = {name: np.concatenate(value) for name, value in by_shard.items()}
    x_TD = rows.pop("x_by_shard")
    d_output_TD = rows.pop("d_output_by_shard", np.zeros_like(x_TD))
    ends = {"token_mask": "token_mask_T", "token_ids": "token_ids_T", "given_ids": "given_ids_TK"}
    inputs = {ends[name.removesuffix("_by_shard")]: value for name, value in rows.items()}
    inputs |= {name: arguments[name] for name in ("table_VK", "seed") if name in arguments}
    return ShardedCase(
        spec=arguments["spec"], params=arguments["params"], x_TD=x_TD, d_output_TD=d_output_TD, inputs=inputs,
        layout=arguments["layout"], tokens_per_shard=tuple(map(len, arguments["x_by_shard"])),
    )  # fmt: skip


def _sharded_layer(arguments: dict[str, Any]) -> Radii:
    case = sharded_case(arguments)
    _clear(case)
    parts = case.by_shard(radius_of_outputs(JUDGE, case))
    shards = [case.layout.shard_of(rank) for rank in range(case.layout.num_ranks)]
    return {f"outputs.{rank}": parts[shard] for rank, shard in enumerate(shards)}, False


def _sharded_gradients(arguments: dict[str, Any]) -> Radii:
    case = sharded_case(arguments)
    _clear(case)
    radii = radii_of_gradients(JUDGE, case) | {"expert_bias_E": 0}
    parts, found = case.by_shard(np.asarray(radii.pop("x_TD"))), {}
    for rank in range(case.layout.num_ranks):
        found |= {f"ranks.{rank}.{name}": radius for name, radius in radii.items()}
        found[f"ranks.{rank}.x_TD"] = parts[case.layout.shard_of(rank)]
    return found, False


def balance_case(arguments: Mapping[str, Any], **rules: Any) -> BalanceCase:
    """The case of a call that counts, charges, bounds or moves; what it does not get is 0."""
    logits_TE, ids_TK = arguments.get("logits_TE"), arguments.get("expert_ids_TK")
    router = arguments.get("router")
    counts_SE = arguments.get("counts_SE")
    T = next((len(each) for each in (logits_TE, ids_TK) if each is not None), 0)
    E = next((each.shape[1] for each in (logits_TE, counts_SE) if each is not None), arguments.get("num_experts", 1))
    K = 1 if ids_TK is None else ids_TK.shape[1]
    zeros_TK = np.zeros((T, K))
    null = router.num_null_experts if router is not None else 0
    return BalanceCase(
        spec=BatchSpec(num_experts=E - null, top_k=K, num_null_experts=null, router=router, **rules),
        logits_TE=np.zeros((T, E)) if logits_TE is None else logits_TE,
        expert_ids_TK=zeros_TK.astype(np.int64) if ids_TK is None else ids_TK,
        weights_TK=arguments.get("weights_TK", zeros_TK),
        d_weights_TK=arguments.get("d_weights_TK", zeros_TK),
        counts_SE=np.zeros((1, E), np.int64) if counts_SE is None else counts_SE,
        expert_bias_E=arguments.get("expert_bias_E", np.zeros(E)),
        inputs={n: arguments[n] for n in ("token_mask_T", "sequence_lengths", "tokens_per_shard") if n in arguments},
    )


def _balance_loss(arguments: dict[str, Any]) -> Radii:
    case = balance_case(arguments, balance=arguments["balance"])
    return vars(loss_radius(JUDGE, case)), False


def _z_loss(arguments: dict[str, Any]) -> Radii:
    case = balance_case(arguments, coeff=arguments["coeff"])
    return vars(z_loss_radius(JUDGE, case)), False


def _bias_update(arguments: dict[str, Any]) -> Radii:
    case = balance_case(arguments, update=arguments["update"])
    return {"expert_bias_E": bias_radius(JUDGE, case, ORACLE.bias_update(**arguments))}, False


def _capacity(arguments: dict[str, Any]) -> Radii:
    case = balance_case(arguments, capacity=arguments["capacity"])
    found: dict[str, Any] = {"weights_TK": weights_radius(JUDGE, case.capacity_trace.weights_TK)}
    return found | {"d_weights_TK": weight_gradient_radius(JUDGE, case)}, False


def _train(arguments: dict[str, Any]) -> Radii:
    events, stack, params = (arguments[name] for name in ("events", "stack", "params"))
    case = TrainingCase(
        spec=stack,
        gates=tuple(each.gate_ED for each in params),
        biases=tuple(each.expert_bias_E for each in params),
        events=tuple(events),
    )
    if not case.margin > MARGIN:
        raise Unclear("its choice hangs on rounding")
    found: dict[str, Any] = {}
    for number, state in enumerate(case.states):
        if state.loss is not None:
            found[f"states.{number}.loss"] = training.loss_radius(JUDGE, case, number, state.loss)
        for layer, (bias_E, update) in enumerate(zip(state.bias_by_layer, stack.updates, strict=True)):
            radius_E = 0 if update is None else training.bias_radius(JUDGE, case, layer, bias_E, update)
            found[f"states.{number}.bias_by_layer.{layer}"] = (number + 1) * radius_E
    return found, False


RADII: dict[str, Callable[[dict[str, Any]], Radii]] = {
    "gate": _gate, "route": _route, "layer": _layer, "layer_gradients": _layer_gradients, "record": _record,
    "replay": _replay, "experts": _experts, "combine": _combine, "sharded_layer": _sharded_layer,
    "sharded_gradients": _sharded_gradients, "balance_loss": _balance_loss, "z_loss": _z_loss,
    "bias_update": _bias_update, "capacity": _capacity, "train": _train, "fused_layer": _fused_layer,
    "upcycled_layer": _upcycled_layer,
}  # fmt: skip
"""Methods that return floats; the others return integers alone."""
