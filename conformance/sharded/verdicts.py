"""conformance, sharded: what a subject returns on a layout, checked for its form, and held against the reference.

Every rank is judged, not rank 0. An error, and a result of another form, violate the requirement of the check that
runs.

Legend: T tokens, D model dim.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conformance.core.capabilities import named_inputs
from conformance.core.check import Condition
from conformance.core.holding import hold
from conformance.core.judge import Judge, NotRun, Violation, accuse
from conformance.layer import bounds
from conformance.layer.verdicts import array_of, dtypes, hold_parameter, judged_T, wanted_gradients
from conformance.sharded.case import ShardedCase
from moe_ref import RouterInputs
from moe_ref.backward.sharded import sharded_backward
from moe_ref.sharded import ShardedTrace, sharded_layer

POISON = (np.nan, 1e30)
"""What rows hold that nobody reads, in calls one after the other."""
NOISE = 1e30
"""Tokens of this size leave inf and NaN in every buffer, and a choice of experts that is a number."""

Gradients = dict[str, np.ndarray]


# calling a subject


def outputs_of_subject(judge: Judge, case: ShardedCase, **more: Any) -> list[np.ndarray]:
    """The subject's (T, D) output of the shard of each rank, tensor ranks included."""
    x_by_shard = case.by_shard(case.x_TD.astype(np.float32))
    given = (x_by_shard, case.params.astype(np.float32), case.spec, case.layout)
    found = _of_every_rank(case, judge.call(case, "sharded_layer", *given, **case.inputs_by_shard, **more))
    shapes = [x_by_shard[case.layout.shard_of(rank)].shape for rank in range(case.layout.num_ranks)]
    return [
        array_of(value, shape, f"rank {rank}: output")
        for rank, (value, shape) in enumerate(zip(found, shapes, strict=True))
    ]


def gradients_of_subject(judge: Judge, case: ShardedCase, **more: Any) -> list[Gradients]:
    """The subject's gradients by name on each rank, each of the shape of what it belongs to."""
    x_by_shard = case.by_shard(case.x_TD.astype(np.float32))
    d_output_by_shard = case.by_shard(case.d_output_TD.astype(np.float32))
    given = (x_by_shard, case.params.astype(np.float32), case.spec, case.layout, d_output_by_shard)
    found = _of_every_rank(case, judge.call(case, "sharded_gradients", *given, **case.inputs_by_shard, **more))
    shapes = {name: np.shape(value) for name, value in case.params.by_name().items()}
    optional, by_rank = {"expert_bias_E"}, []
    for rank, grads in enumerate(found):
        wanted = shapes | {"x_TD": x_by_shard[case.layout.shard_of(rank)].shape}
        names = grads.keys() if isinstance(grads, dict) else set()
        if wanted.keys() - names - optional or names - wanted.keys() - optional:
            expected, received = (", ".join(sorted(each)) for each in (wanted, names))
            accuse(f"rank {rank}: gradients of other parameters", expected=expected, received=received)
        by_rank.append({n: array_of(grads[n], wanted[n], f"rank {rank}: {n}") for n in wanted if n in names})
    return by_rank


def _of_every_rank(case: ShardedCase, found: Any) -> list:
    ranks = case.layout.num_ranks
    if not isinstance(found, (list, tuple)) or len(found) != ranks:
        received = f"{len(found)} of them" if isinstance(found, (list, tuple)) else str(type(found))
        accuse("not one result for each rank", expected=f"a list of {ranks}", received=received)
    return list(found)


def fills_of_buffers(judge: Judge, method: str) -> list[tuple[str, dict[str, float]]]:
    """(what the buffers held, how the subject is told), for each of two calls one after the other.

    A subject that names buffer_fill lets us fill the rows of its buffers that nobody sends; of another one we know that
    it was called with noise.
    """
    if "buffer_fill" in named_inputs(judge.subject, method):
        return [(f"buffers that held {fill:g}", {"buffer_fill": fill}) for fill in POISON]
    return [("a call with huge tokens", {})] * len(POISON)


def fill_buffers_with_noise(judge: Judge, case: ShardedCase, call: Callable[[Judge, ShardedCase], Any]) -> None:
    """A call with huge tokens and gradients, whose inf and NaN stay in whatever buffer is not cleared."""
    sign_TD = np.where(case.x_TD < 0, -NOISE, NOISE)
    call(judge, case.with_(x_TD=sign_TD, d_output_TD=np.full(case.d_output_TD.shape, NOISE)))


# the reference on the layout itself, without the slots that no buffer admitted


def trace_on_layout(case: ShardedCase) -> ShardedTrace:
    """The oracle's trace of every shard and rank."""
    inputs = RouterInputs.keywords(case.inputs_by_shard)
    return sharded_layer(case.by_shard(case.x_TD), case.params, case.spec, case.layout, **inputs)


def gradients_on_layout(case: ShardedCase) -> Gradients:
    """The oracle's gradients of that, by name."""
    grads = sharded_backward(trace_on_layout(case), case.params, case.spec, case.by_shard(case.d_output_TD))
    named = {name: getattr(grads.params, name) for name in wanted_gradients(case) if name != "x_TD"}
    return {"x_TD": np.concatenate(grads.x_by_shard)} | {name: np.asarray(grad) for name, grad in named.items()}


# how far rounding can take a number


def _factor(judge: Judge, parts: int) -> float:
    """How many times the roundings of the one-rank layer those of a sharded one are.

    Partial sums are weighed and rounded each by itself: at most every rounding once more. A narrow dtype, which adds
    within a matmul in float32, rounds once more for each part that is added.
    """
    return 2 if dtypes(judge)[1] in ("float32", "float64") else 2 + parts


def radius_of_outputs(judge: Judge, case: ShardedCase) -> np.ndarray:
    """(T, D) how far rounding can take the output of any layout."""
    return _factor(judge, case.layout.tensor) * bounds.layer(case, *dtypes(judge)).output_TD.radius


def radii_of_gradients(judge: Judge, case: ShardedCase) -> Gradients:
    """How far rounding can take each gradient of any layout, by name."""
    factor = _factor(judge, case.layout.num_ranks)
    return {name: factor * ball.radius for name, ball in bounds.gradients(case, *dtypes(judge)).items()}


# holding what returned against the reference


def name_of_rank(case: ShardedCase, rank: int) -> str:
    """A rank with its coordinates."""
    axes = zip(("data", "fsdp", "expert", "tensor"), case.layout.coordinates(rank), strict=True)
    where = ", ".join(f"{axis} {at}" for axis, at in axes if getattr(case.layout, axis) > 1)
    return f"rank {rank} ({where})" if where else f"rank {rank}"


def token_of_shard(token: int) -> str:
    """A token by its number on its shard."""
    return f"token {token} of the shard"


def of_first_ranks(case: ShardedCase, by_rank: Sequence[np.ndarray]) -> np.ndarray:
    """(T, ...) what the first rank of each shard has, one shard after the other."""
    ranks = [case.layout.shard_of(rank) for rank in range(case.layout.num_ranks)]
    return np.concatenate([by_rank[ranks.index(shard)] for shard in range(case.layout.num_token_shards)])


def hold_ranks(
    case: ShardedCase,
    title: str,
    by_rank: Sequence[np.ndarray],
    wanted_TD: np.ndarray,
    radius_TD: np.ndarray | float = 0.0,
    *,
    rows: np.ndarray | None = None,
) -> None:
    """What every rank has for its tokens is within the radius of what is wanted."""
    ends = np.cumsum(case.tokens_per_shard)
    for rank, found in enumerate(by_rank):
        end, found_TD = ends[case.layout.shard_of(rank)], wanted_TD.copy()
        found_TD[end - len(found) : end] = found
        hold(f"{name_of_rank(case, rank)}: {title}", found_TD, wanted_TD, radius_TD, rows=rows)


def hold_outputs(judge: Judge, case: ShardedCase, title: str, *, wanted_TD: np.ndarray | None = None) -> None:
    """Every rank's output is that of the one-rank layer, for the tokens whose choice is beyond doubt."""
    found = outputs_of_subject(judge, case)
    wanted_TD = case.reference.output_TD if wanted_TD is None else wanted_TD
    hold_ranks(case, title, found, wanted_TD, radius_of_outputs(judge, case), rows=judged_T(judge, case))


def hold_gradients(judge: Judge, case: ShardedCase, names: Iterable[str], title: str) -> None:
    """The gradients of these names are those of the one-rank layer on every rank."""
    found, radii = gradients_of_subject(judge, case), radii_of_gradients(judge, case)
    hold_each(case, title, found, wanted_gradients(case), radii, names, rows=judged_T(judge, case))


def hold_each(
    case: ShardedCase,
    title: str,
    found: Sequence[Gradients],
    wanted: Gradients,
    radii: Gradients,
    names: Iterable[str],
    *,
    rows: np.ndarray,
) -> None:
    """Gradients by name on every rank; those of parameters only where every token is judged."""
    for name in (each for each in names if each in wanted):
        if name == "x_TD":
            hold_ranks(case, title, [grads[name] for grads in found], wanted[name], radii[name], rows=rows)
        elif rows.all():
            for rank, grads in enumerate(found):
                hold_parameter(f"{name_of_rank(case, rank)}: {title}", name, grads[name], wanted[name], radii[name])


def hold_alike(
    case: ShardedCase,
    title: str,
    found: Sequence[Gradients],
    wanted: Sequence[Gradients],
    names: Iterable[str],
    radii: Mapping[str, np.ndarray | float],
) -> None:
    """What each rank has in two calls is the same, within twice a radius; the tokens are those of its shard."""
    for name in names:
        for rank, (first, second) in enumerate(zip(found, wanted, strict=True)):
            full_title, radius = f"{name_of_rank(case, rank)}: {title}", radii[name]
            if name == "x_TD":
                radius = case.by_shard(np.asarray(radius))[case.layout.shard_of(rank)]
            hold_parameter(full_title, name, first[name], second[name], 2 * radius)


def hold_same(case: ShardedCase, title: str, by_rank: Sequence[np.ndarray]) -> None:
    """Ranks of one shard have the same, bit for bit."""
    first_of: dict[int, int] = {}
    for rank, found in enumerate(by_rank):
        first = first_of.setdefault(case.layout.shard_of(rank), rank)
        full_title = f"{name_of_rank(case, rank)}: {title} {name_of_rank(case, first)}"
        hold(full_title, found, by_rank[first], label=token_of_shard)


# what explains a violation


def _outputs_are_wrong(judge: Judge, case: ShardedCase) -> bool:
    """The subject's outputs are not those of the one-rank layer, where it runs the case at all."""
    try:
        hold_outputs(judge, case, "")
    except Violation:
        return True
    except NotRun:
        return False
    return False


OUTPUTS_ARE_WRONG = Condition(sentence="judged where the outputs are right", holds=_outputs_are_wrong)


def wrong_already(simplify: Callable[[ShardedCase], ShardedCase | None]) -> Condition:
    """The outputs of a simpler case are wrong, and no requirement need say so."""

    def holds(judge: Judge, case: ShardedCase) -> bool:
        simpler = simplify(case)
        return simpler is not None and _outputs_are_wrong(judge, simpler)

    return Condition(sentence="judged where the outputs of simpler layouts are right", holds=holds)
