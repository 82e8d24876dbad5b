"""conformance, suite: replay. A recorded choice of experts is forced on a layer."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer import bounds as layer_bounds
from conformance.layer.balls import narrower
from conformance.layer.verdicts import blaming, dtypes, hold, judged_T, output
from moe_ref import UNUSED, RoutingRecord, capture, replay_layer

FORM = ("EXP-2", "EXP-3", "EXP-4", "CMB-2", "RPL-1")


def replayable(spec) -> bool:
    """Routers whose weights follow from the chosen ids."""
    r = spec.router
    return r.selector in ("top_k", "given") and r.weights_from == "scores" and not r.num_scored_shared_experts


def weighted_by(spec) -> bool:
    """Weights that differ from token to token."""
    return replayable(spec) and not (spec.router.top_k == 1 and spec.router.route_norm)


def record_of(case, *, weights: bool, unused: float = 0.0, mask_T=None) -> RoutingRecord:
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


def replayed(judge, case, record) -> np.ndarray:
    """The subject's (T, D) output of a replay."""
    given = (case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec, record)
    found = np.asarray(judge.call(case, "replay", *given), dtype=np.float64)
    if found.shape != case.x_TD.shape:
        accuse("output of another shape", expected=str(case.x_TD.shape), received=str(found.shape))
    return found


def forced(case, record):
    """The reference's trace of a replay."""
    return replay_layer(record, case.x_TD, case.params, case.spec, with_weights=record.weights_TK is not None)


def radius_of(judge, case, record) -> np.ndarray:
    """(T, D) how far rounding can take an output: as in a layer with the recorded choice given."""
    trace = forced(case, record)
    bare = case.spec.router.given()
    given = {"given_ids_TK": record.expert_ids_TK.astype(np.int64), "token_mask_T": record.token_mask_T}
    layer = case.with_(spec=case.spec.replace(router=bare), inputs=given).with_params(expert_bias_E=None)
    radius_TD = layer_bounds.layer(layer, *dtypes(judge)).output_TD.radius
    own = layer.reference.routing.weights_TK
    largest_T = np.abs(own).max(axis=-1, initial=0)
    ratio_T = np.abs(trace.routing.weights_TK).max(axis=-1, initial=0) / np.maximum(largest_T, 1e-6)
    return radius_TD * np.maximum(1, 4 * ratio_T)[:, None] ** 2


def hold_replay(judge, case, record, title: str) -> None:
    """The output is that of the reference with this record."""
    found_TD = replayed(judge, case, record)
    hold(case, title, found_TD, forced(case, record).output_TD, radius_of(judge, case, record))


@requires("RPL-1", method="replay", spec=replayable, tokens=(7, 1, 0))
def test_a_replay_returns_one_output_for_each_token(judge, case):
    replayed(judge, case, record_of(case, weights=False))


@requires("RPL-2", method="replay", spec=weighted_by, bias=("none",), after=(*FORM, "RPL-4"))
def test_ids_alone_take_this_routers_weights(judge, case):
    hold_replay(judge, case, record_of(case, weights=False), "not this router's weights")


@requires("RPL-3", method="replay", spec=replayable, bias=("none",), after=FORM)
def test_recorded_weights_are_taken_as_they_are(judge, case):
    hold_replay(judge, case, record_of(case, weights=True), "not the recorded weights")


@requires("RPL-4", method="replay", spec=replayable, bias=("mixed", "crowded"), after=FORM)
def test_the_recorded_experts_are_taken(judge, case):
    # With one weight for all, only the choice of experts makes a difference.
    record = record_of(case, weights=True)
    ones_TK = np.ones_like(record.weights_TK)
    hold_replay(judge, case, replace_weights(record, ones_TK), "not the recorded experts")


def replace_weights(record, weights_TK) -> RoutingRecord:
    """The record with other weights."""
    return RoutingRecord.from_arrays(record.to_arrays() | {"weights_TK": weights_TK}, record.spec)


@requires("RPL-5", method="replay", spec=replayable, after=(*FORM, "RPL-3", "RPL-4"), tokens=(7,))
def test_an_unused_slot_adds_nothing(judge, case):
    for weights in (False, True):
        hold_replay(judge, case, record_of(case, weights=weights, unused=0.4), "with unused slots")


@requires("RPL-6", method="replay", spec=replayable, after=(*FORM, "RPL-3", "RPL-4"), tokens=(7,))
def test_padding_of_a_record_has_the_output_0(judge, case):
    mask_T = case.rng().random(case.num_tokens) < 0.6
    mask_T[0], mask_T[-1] = False, True
    record = record_of(case, weights=True, mask_T=mask_T)
    found_TD, wanted_TD = replayed(judge, case, record), forced(case, record).output_TD
    radius_TD = np.where(mask_T[:, None], radius_of(judge, case, record), 0)
    hold(case, "with padding in the record", found_TD, wanted_TD, radius_TD)


@requires("RPL-7", method="replay", spec=replayable, after=FORM, tokens=(7,))
def test_each_token_takes_its_own_row(judge, case):
    record, order = record_of(case, weights=True), case.rng().permutation(case.num_tokens)
    plain_TD = replayed(judge, case, record)
    rows = {name: v[order] for name, v in record.to_arrays().items() if v is not None and name != "sequence_starts_B"}
    turned = RoutingRecord.from_arrays(record.to_arrays() | rows, record.spec)
    found_TD = replayed(judge, case.with_(x_TD=case.x_TD[order], inputs={}), turned)
    radius_TD = 2 * radius_of(judge, case, record)
    back_TD = np.empty_like(found_TD)
    back_TD[order] = found_TD
    hold(case, "another output in another order", back_TD, plain_TD, radius_TD)
    hold(case, "not its own row", plain_TD, forced(case, record).output_TD, radius_TD)


@requires("RPL-8", method="record", spec=lambda s: replayable(s) and s.router.selector == "top_k",
          inputs=("token_mask_T",), tokens=(7,))  # fmt: skip
def test_a_record_holds_the_choice_and_its_weights(judge, case):
    found, wanted = recorded(judge, case), capture(case.reference.routing, case.spec.router)
    clear_T = judged_T(judge, case)
    order = [np.argsort(r.expert_ids_TK, axis=-1, kind="stable") for r in (found, wanted)]
    ids = [np.take_along_axis(r.expert_ids_TK, o, -1) for r, o in zip((found, wanted), order, strict=True)]
    nothing = np.zeros(ids[0].shape)
    hold(case, "not the experts of the run", ids[0], ids[1], nothing, rows=clear_T)
    weights = [np.take_along_axis(r.weights_TK, o, -1) for r, o in zip((found, wanted), order, strict=True)]
    ball = layer_bounds.layer(case, *dtypes(judge)).weights_TK
    radius_TK = 4 * ball.radius.max(axis=-1, keepdims=True) + 2e-7 * np.abs(weights[1])
    hold(case, "not the weights of the run", weights[0], weights[1], radius_TK, rows=clear_T)


def recorded(judge, case):
    """The subject's record of its run, with weights."""
    given = (case.x_TD.astype(np.float32), case.params.astype(np.float32), case.spec)
    found = judge.call(case, "record", *given, **case.inputs)
    if not isinstance(found, RoutingRecord) or found.weights_TK is None:
        accuse("no record with weights", expected="RoutingRecord", received=type(found).__name__)
    shape = (case.num_tokens, case.spec.router.top_k)
    if found.expert_ids_TK.shape != shape:
        accuse("a record of another shape", expected=str(shape), received=str(found.expert_ids_TK.shape))  # fmt: skip
    return found


@requires("RPL-9", method="record", spec=lambda s: replayable(s) and s.router.selector == "top_k", tokens=(7,),
          after=("RPL-8",))  # fmt: skip
def test_a_recorded_run_is_replayed(judge, case):
    judge.needs("replay")
    if "layer" not in judge.capabilities:
        raise NotRun("layer() is not defined")
    record = recorded(judge, case)
    again = RoutingRecord.from_arrays(record.to_arrays(), record.spec)
    found_TD, wanted_TD = replayed(judge, case, again), output(judge, case)
    # A record holds float32 weights, however wide the run was.
    narrow = (narrower(dtype, "float32") for dtype in dtypes(judge))
    radius_TD = 4 * layer_bounds.layer(case, *narrow).output_TD.radius
    hold(case, "another output than in the run", found_TD, wanted_TD, radius_TD)
