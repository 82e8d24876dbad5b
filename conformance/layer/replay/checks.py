"""conformance, layer: replay. A recorded choice of experts is forced on a layer.

Legend: T tokens, D model dim, K top_k.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from conformance.core.holding import hold
from conformance.core.judge import Judge, Violation, accuse
from conformance.core.show import numbers, shortened
from conformance.layer import bounds
from conformance.layer.balls import narrower
from conformance.layer.case import LayerCase
from conformance.layer.kind import requires
from conformance.layer.verdicts import array_of, dtypes, judged_T, output_of_subject
from moe_ref import UNUSED, LayerSpec, RoutingRecord, capture, replay_layer
from moe_ref.layer import LayerTrace

FORWARD = ("EXP-2", "EXP-3", "EXP-4", "CMB-2", "RPL-1")
"""Where one of these fails on the same case, the replay fails too, and is not the one to blame."""
FLOAT32_WEIGHT = 2e-7
"""Relative error of a weight that a record holds in float32, and a little."""


def replayable(spec: LayerSpec) -> bool:
    """Routers whose weights follow from the chosen ids."""
    r = spec.router
    return r.selector in ("top_k", "given") and r.weights_from == "scores" and not r.num_scored_shared_experts


def recordable(spec: LayerSpec) -> bool:
    """Those of them that choose by themselves."""
    return replayable(spec) and spec.router.selector == "top_k"


def leaves_slots_unused(spec: LayerSpec) -> bool:
    """Routers that choose by themselves, and some of whose tokens have fewer experts than slots."""
    return spec.router.varies and not spec.router.num_scored_shared_experts


def weighs_apart(spec: LayerSpec) -> bool:
    """Weights that differ from token to token."""
    return replayable(spec) and not (spec.router.top_k == 1 and spec.router.route_norm)


def any_record(
    case: LayerCase, *, weights: bool, unused: float = 0.0, mask_T: np.ndarray | None = None
) -> RoutingRecord:
    """Any choice for each token, unlike its own one, with weights that no router would give."""
    rng, router, T = case.rng(), case.spec.router, case.num_tokens
    ids_TK = np.argsort(rng.random((T, router.num_choices)), axis=-1)[:, : router.top_k]
    valid_T = np.ones(T, dtype=bool) if mask_T is None else mask_T
    off_TK = (rng.random(ids_TK.shape) < unused) | ~valid_T[:, None]
    weights_TK = np.where(off_TK, 0, rng.integers(1, 64, ids_TK.shape) / 32)
    return RoutingRecord(
        expert_ids_TK=np.where(off_TK, UNUSED, ids_TK),
        weights_TK=weights_TK if weights else None,
        token_mask_T=valid_T,
        sequence_starts_B=np.zeros(1, dtype=np.int64) if T else np.zeros(0, dtype=np.int64),
        spec=router,
    )


def replay_of_subject(judge: Judge, case: LayerCase, record: RoutingRecord) -> np.ndarray:
    """The subject's (T, D) output of a replay."""
    given = (case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec, record)
    return array_of(judge.call(case, "replay", *given), case.x_TD.shape)


def record_of_subject(judge: Judge, case: LayerCase) -> RoutingRecord:
    """The subject's record of its run, with weights."""
    given = (case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec)
    found = judge.call(case, "record", *given, **case.inputs)
    if not isinstance(found, RoutingRecord) or found.weights_TK is None:
        accuse("no record with weights", expected="RoutingRecord", received=type(found).__name__)
    shape = (case.num_tokens, case.spec.router.top_k)
    if found.expert_ids_TK.shape != shape:
        accuse("a record of another shape", expected=shape, received=found.expert_ids_TK.shape)
    return found


def reference_of(case: LayerCase, record: RoutingRecord) -> LayerTrace:
    """The reference's trace of a replay."""
    return replay_layer(record, case.x_TD, case.params, case.spec, with_weights=record.weights_TK is not None)


def radius_of_replay(judge: Judge, case: LayerCase, record: RoutingRecord) -> np.ndarray:
    """(T, D) how far rounding can take an output: as in a layer with the recorded choice given."""
    trace = reference_of(case, record)
    bare = case.spec.router.given()
    given = {"given_ids_TK": record.expert_ids_TK.astype(np.int64), "token_mask_T": record.token_mask_T}
    layer = case.with_(spec=case.spec.replace(router=bare), inputs=given).with_params(expert_bias_E=None)
    radius_TD = bounds.layer(layer, *dtypes(judge)).output_TD.radius
    own = layer.reference.routing.weights_TK
    largest_T = np.abs(own).max(axis=-1, initial=0)
    ratio_T = np.abs(trace.routing.weights_TK).max(axis=-1, initial=0) / np.maximum(largest_T, 1e-6)
    return radius_TD * np.maximum(1, 4 * ratio_T)[:, None] ** 2


@contextmanager
def showing(record: RoutingRecord) -> Iterator[None]:
    """What is found wrong meanwhile shows the record on its page: the case has only what the layer would choose."""
    try:
        yield
    except Violation as violation:
        weights = "none" if record.weights_TK is None else shortened(numbers(record.weights_TK))
        violation.rows = [
            ("record ids", f"{shortened(numbers(record.expert_ids_TK))}, one row for each token"),
            ("record weights", weights),
            ("record mask", f"{numbers(record.token_mask_T)}, False where a token is padding"),
        ]
        raise


def hold_replay(judge: Judge, case: LayerCase, record: RoutingRecord, title: str) -> None:
    """The output is that of the reference with this record."""
    with showing(record):
        found_TD = replay_of_subject(judge, case, record)
        hold(title, found_TD, reference_of(case, record).output_TD, radius_of_replay(judge, case, record))


def with_weights(record: RoutingRecord, weights_TK: np.ndarray) -> RoutingRecord:
    """The record with other weights."""
    return RoutingRecord.from_arrays(record.to_arrays() | {"weights_TK": weights_TK}, record.spec)


@requires("RPL-1", method="replay", spec=replayable, tokens=(7, 1, 0))
def a_replay_returns_one_output_for_each_token(judge, case):
    record = any_record(case, weights=False)
    with showing(record):
        replay_of_subject(judge, case, record)


@requires("RPL-2", large=2, method="replay", spec=weighs_apart, bias=("none", "mixed"), after=(*FORWARD, "RPL-4"))
def ids_alone_take_this_routers_weights(judge, case):
    hold_replay(judge, case, any_record(case, weights=False), "not this router's weights")


@requires("RPL-3", large=3, method="replay", spec=replayable, bias=("none",), after=FORWARD)
def recorded_weights_are_taken_as_they_are(judge, case):
    hold_replay(judge, case, any_record(case, weights=True), "not the recorded weights")


@requires("RPL-4", large=1, method="replay", spec=replayable, bias=("mixed", "crowded"), after=FORWARD)
def the_recorded_experts_are_taken(judge, case):
    # With one weight for all, only the choice of experts makes a difference.
    record = any_record(case, weights=True)
    ones_TK = np.ones_like(record.weights_TK)
    hold_replay(judge, case, with_weights(record, ones_TK), "not the recorded experts")


@requires("RPL-5", method="replay", spec=replayable, after=(*FORWARD, "RPL-3", "RPL-4"), tokens=(7,))
def an_unused_slot_adds_nothing(judge, case):
    for weights, unused in ((False, 0.4), (False, 1.0), (True, 0.4)):
        hold_replay(judge, case, any_record(case, weights=weights, unused=unused), "with unused slots")


@requires("RPL-6", large=3, method="replay", spec=replayable, after=(*FORWARD, "RPL-3", "RPL-4"), tokens=(7,))
def padding_of_a_record_has_the_output_0(judge, case):
    mask_T = case.rng().random(case.num_tokens) < 0.6
    mask_T[0], mask_T[-1] = False, True
    record = any_record(case, weights=True, mask_T=mask_T)
    radius_TD = np.where(mask_T[:, None], radius_of_replay(judge, case, record), 0)
    with showing(record):
        found_TD, wanted_TD = replay_of_subject(judge, case, record), reference_of(case, record).output_TD
        hold("with padding in the record", found_TD, wanted_TD, radius_TD)


@requires("RPL-7", method="replay", spec=replayable, after=FORWARD, tokens=(7,))
def each_token_takes_its_own_row(judge, case):
    record, order = any_record(case, weights=True), case.rng().permutation(case.num_tokens)
    plain_TD = replay_of_subject(judge, case, record)
    rows = {name: v[order] for name, v in record.to_arrays().items() if v is not None and name != "sequence_starts_B"}
    reordered = RoutingRecord.from_arrays(record.to_arrays() | rows, record.spec)
    found_TD = replay_of_subject(judge, case.with_(x_TD=case.x_TD[order], inputs={}), reordered)
    radius_TD = 2 * radius_of_replay(judge, case, record)
    back_TD = np.empty_like(found_TD)
    back_TD[order] = found_TD
    with showing(record):
        hold("another output in another order", back_TD, plain_TD, radius_TD)
        hold("not its own row", plain_TD, reference_of(case, record).output_TD, radius_TD)


@requires(
    "RPL-8",
    method="record",
    spec=lambda spec: recordable(spec) or leaves_slots_unused(spec),
    inputs=("token_mask_T",),
    tokens=(7,),
)
def a_record_holds_the_choice_and_its_weights(judge, case):
    found, wanted = record_of_subject(judge, case), capture(case.reference.routing, case.spec.router)
    clear_T = judged_T(judge, case)
    order = [np.argsort(r.expert_ids_TK, axis=-1, kind="stable") for r in (found, wanted)]
    ids = [np.take_along_axis(r.expert_ids_TK, o, -1) for r, o in zip((found, wanted), order, strict=True)]
    hold("not the experts of the run", ids[0], ids[1], rows=clear_T)
    weights = [np.take_along_axis(r.weights_TK, o, -1) for r, o in zip((found, wanted), order, strict=True)]
    ball = bounds.layer(case, *dtypes(judge)).weights_TK
    radius_TK = 4 * ball.radius.max(axis=-1, keepdims=True) + FLOAT32_WEIGHT * np.abs(weights[1])
    hold("not the weights of the run", weights[0], weights[1], radius_TK, rows=clear_T)


@requires("RPL-9", method="record", spec=recordable, tokens=(7,), after=("RPL-8",))
def a_recorded_run_is_replayed(judge, case):
    record = record_of_subject(judge, case)
    again = RoutingRecord.from_arrays(record.to_arrays(), record.spec)
    found_TD, wanted_TD = replay_of_subject(judge, case, again), output_of_subject(judge, case)
    # A record holds float32 weights, however wide the run was.
    narrow = (narrower(dtype, "float32") for dtype in dtypes(judge))
    hold("another output than in the run", found_TD, wanted_TD, 4 * bounds.layer(case, *narrow).output_TD.radius)
