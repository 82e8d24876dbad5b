"""conformance, the verdicts on layouts: calls a sharded subject, and holds every rank against the reference.

Each call checks the form of the result, and blames the requirement that it is given.

Legend: T tokens, K top_k, D model dim, E experts, e experts on this rank, R rows on this rank, S ranks.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields

import numpy as np

from conformance.core.judge import Judge, NotRun, Violation
from conformance.layer import bounds as layer_bounds
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import (
    _array,
    dtypes,
    excusing,
    hold,
    hold_gradients,
    hold_layer,
    hold_parameter,
    judged_T,
    wanted_gradients,
)
from conformance.sharded.case import LayoutCase
from moe_ref import RouterInputs
from moe_ref.backward.sharded import sharded_backward
from moe_ref.sharded import sharded_layer

LAYOUT_FORM = {"dispatch": "DSP-1", "sharded_layer": "LYT-1", "sharded_gradients": "LYT-18"}
"""The requirement that a method runs at all, and returns what has the right shape."""
POISON = (np.nan, 1e30)
"""What rows hold that nobody reads, in calls one after the other."""
DIRT = 1e30
"""Tokens of this size leave inf and NaN in every buffer, and a choice of experts that is a number."""


def layer_of(case: LayoutCase) -> LayerCase:
    """The same on one rank, as a case of the layer."""
    return LayerCase(**{f.name: getattr(case, f.name) for f in fields(LayerCase)})


# calling a subject


def outputs(judge: Judge, case: LayoutCase, **more) -> list[np.ndarray]:
    """The subject's (T, D) output of the shard of each rank, tensor ranks included."""
    x_by_shard = case.by_shard(case.x_TD.astype(np.float32))
    given = (x_by_shard, case.params.astype(np.float32), case.spec, case.layout)
    found = judge.call(case, "sharded_layer", *given, **case.inputs_by_shard, **more)
    found = _of_every_rank(case, found, case.layout.num_ranks)
    return [
        _array(case, value, x_by_shard[case.layout.shard_of(rank)].shape, f"rank {rank}: output")
        for rank, value in enumerate(found)
    ]


def gradients_by_rank(judge: Judge, case: LayoutCase, **more) -> list[dict[str, np.ndarray]]:
    """The subject's gradients by name on each rank, each of the shape of what it belongs to."""
    x_by_shard = case.by_shard(case.x_TD.astype(np.float32))
    d_output_by_shard = case.by_shard(case.d_output_TD.astype(np.float32))
    given = (x_by_shard, case.params.astype(np.float32), case.spec, case.layout, d_output_by_shard)
    found = judge.call(case, "sharded_gradients", *given, **case.inputs_by_shard, **more)
    shapes = {f.name: np.shape(getattr(case.params, f.name)) for f in fields(case.params)
              if getattr(case.params, f.name) is not None}  # fmt: skip
    optional = {"expert_bias_E"}
    by_rank = []
    for rank, grads in enumerate(_of_every_rank(case, found, case.layout.num_ranks)):
        wanted = shapes | {"x_TD": x_by_shard[case.layout.shard_of(rank)].shape}
        names = grads.keys() if isinstance(grads, dict) else set()
        if wanted.keys() - names - optional or names - wanted.keys() - optional:
            accuse(f"rank {rank}: gradients of other parameters", expected=", ".join(sorted(wanted)), received=", ".join(sorted(names)))  # fmt: skip
        by_rank.append({n: _array(case, grads[n], wanted[n], f"rank {rank}: {n}") for n in wanted if n in names})
    return by_rank


def _of_every_rank(case: LayoutCase, found, ranks: int) -> list:
    if not isinstance(found, (list, tuple)) or len(found) != ranks:
        received = f"{len(found)} of them" if isinstance(found, (list, tuple)) else str(type(found))
        accuse("not one result for each rank", expected=f"a list of {ranks}", received=received)
    return list(found)


def fills_buffers(judge: Judge, method: str) -> bool:
    """Whether the subject lets us fill the buffer rows that nobody sends."""
    return "buffer_fill" in inspect.signature(getattr(judge.subject, method)).parameters


# holding what returned against the reference


def name_of(case: LayoutCase, rank: int) -> str:
    """A rank with its coordinates."""
    axes = zip(("data", "fsdp", "expert", "tensor"), case.layout.coordinates(rank), strict=True)
    where = ", ".join(f"{axis} {at}" for axis, at in axes if getattr(case.layout, axis) > 1)
    return f"rank {rank} ({where})" if where else f"rank {rank}"


def whole(case: LayoutCase, by_rank: list[np.ndarray]) -> np.ndarray:
    """(T, ...) what the first rank of each shard has, one shard after the other."""
    ranks = [case.layout.shard_of(rank) for rank in range(case.layout.num_ranks)]
    shards = range(case.layout.num_token_shards)
    return np.concatenate([by_rank[ranks.index(shard)] for shard in shards])


def hold_ranks(case: LayoutCase, title: str, by_rank, wanted_TD, radius_TD, *, rows=None) -> None:
    """What every rank has for its tokens is within the radius of what is wanted."""
    starts = np.concatenate([[0], case.ends]).astype(int)
    for rank, found in enumerate(by_rank):
        start = starts[case.layout.shard_of(rank)]
        found_TD = wanted_TD.copy()
        found_TD[start : start + len(found)] = found
        hold(case, f"{name_of(case, rank)}: {title}", found_TD, wanted_TD, radius_TD, rows=rows)


def _factor(judge: Judge, parts: int) -> float:
    """How many times the roundings of the one-rank layer those of a sharded one are.

    Partial sums are weighed and rounded each by itself: at most every rounding once more. A narrow dtype, which adds
    within a matmul in float32, rounds once more for each part that is added.
    """
    return 2 if dtypes(judge)[1] in ("float32", "float64") else 2 + parts


def radius_of(judge: Judge, case: LayoutCase) -> np.ndarray:
    """(T, D) how far rounding can take the output of any layout."""
    return _factor(judge, case.layout.tensor) * layer_bounds.layer(case, *dtypes(judge)).output_TD.radius


def radii_of_gradients(judge: Judge, case: LayoutCase) -> dict[str, np.ndarray]:
    """How far rounding can take each gradient of any layout, by name."""
    factor = _factor(judge, case.layout.num_ranks)
    return {name: factor * ball.radius for name, ball in layer_bounds.gradients(case, *dtypes(judge)).items()}


def hold_outputs(judge: Judge, case: LayoutCase, title: str, *, wanted_TD=None) -> None:
    """Every rank's output is the reference's, for the tokens whose choice is beyond doubt."""
    found = outputs(judge, case)
    wanted_TD = case.reference.output_TD if wanted_TD is None else wanted_TD
    clear_T = judged_T(judge, case)
    with excusing(judge, case):
        hold_ranks(case, title, found, wanted_TD, radius_of(judge, case), rows=clear_T)


def hold_gradients_of_ranks(judge: Judge, case: LayoutCase, names, title: str, *, found=None) -> None:
    """The gradients of these names are the reference's on every rank, where every choice is beyond doubt."""
    found = gradients_by_rank(judge, case) if found is None else found
    radii, clear_T = radii_of_gradients(judge, case), judged_T(judge, case)
    with excusing(judge, case):
        hold_each(case, title, found, wanted_gradients(case), radii, names, rows=clear_T)


def hold_each(case: LayoutCase, title: str, found, wanted, radii, names, *, rows) -> None:
    """Gradients by name on every rank; those of parameters only where every token is judged."""
    for name in (each for each in names if each in wanted):
        if name == "x_TD":
            by_rank = [grads[name] for grads in found]
            hold_ranks(case, title, by_rank, wanted[name], radii[name], rows=rows)
        elif rows.all():
            for rank, grads in enumerate(found):
                title_of_rank = f"{name_of(case, rank)}: {title}"
                hold_parameter(case, title_of_rank, name, grads[name], wanted[name], radii[name])


def soil(judge: Judge, case: LayoutCase, method: str) -> None:
    """A call with huge tokens and gradients, whose inf and NaN stay in whatever buffer is not cleared."""
    sign_TD = np.where(case.x_TD < 0, -DIRT, DIRT)
    dirty = case.with_(x_TD=sign_TD, d_output_TD=np.full(case.d_output_TD.shape, DIRT))
    call = outputs if method == "sharded_layer" else gradients_by_rank
    call(judge, dirty)


def hold_same(case: LayoutCase, title: str, by_rank: list[np.ndarray]) -> None:
    """Ranks of one shard have the same, bit for bit."""
    first_of: dict[int, int] = {}
    for rank, found in enumerate(by_rank):
        first = first_of.setdefault(case.layout.shard_of(rank), rank)
        wanted, nothing = by_rank[first], np.zeros(found.shape)
        full_title = f"{name_of(case, rank)}: {title} {name_of(case, first)}"
        hold(case, full_title, found, wanted, nothing, label=lambda row: f"token {row} of the shard")


def refused(call: Callable[[], list]) -> list | None:
    """What the call returns; None where it refuses what it is given with a ValueError."""
    try:
        return call()
    except Violation as violation:
        if violation.title == "raised an error" and "ValueError" in violation.received:
            return None
        raise


def layer_is_wrong(judge: Judge, case: LayoutCase, method: str) -> bool:
    """The subject's own one-rank layer, or its gradients, are wrong on these tokens already."""
    try:
        if method == "layer":
            hold_layer(judge, case, "")
        else:
            hold_gradients(judge, case, wanted_gradients(case), "")
    except Violation:
        return True
    except NotRun:
        return False
    return False


def truncated(case: LayoutCase):
    """The oracle's trace of the layout itself, without the slots that no buffer admitted."""
    inputs = RouterInputs.keywords(case.inputs_by_shard)
    return sharded_layer(case.by_shard(case.x_TD), case.params, case.spec, case.layout, **inputs)


def truncated_gradients(case: LayoutCase) -> dict[str, np.ndarray]:
    """The oracle's gradients of that, by name."""
    grads = sharded_backward(truncated(case), case.params, case.spec, case.by_shard(case.d_output_TD))
    named = {name: getattr(grads.params, name) for name in wanted_gradients(case) if name != "x_TD"}
    return {"x_TD": np.concatenate(grads.x_by_shard)} | {name: np.asarray(grad) for name, grad in named.items()}
