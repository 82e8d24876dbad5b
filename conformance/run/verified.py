"""conformance, the families: how far the real router and block of each are from moe_ref, measured and stored.

`python -m tools.families` measures; what it stored is read without any framework. Everything is tiny: at most 16
experts, tokens and weights drawn from a seed.

Legend: T tokens, D model dim, E choices, K top_k.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conformance.core.judge import cast
from conformance.core.rounding import EPSILON, rounded_to
from conformance.precision.audit import batch
from conformance.subjects.transformers.blocks import BLOCKS
from moe_ref import LayerParams, LayerTrace, RouterInputs, RouterSpec, moe_layer, route
from moe_ref.specs.families import FAMILIES

if TYPE_CHECKING:
    from conformance.subjects.transformers.subject import Transformers

STORED = Path(__file__).with_name("verified.json")
DTYPES = ("float32", "bfloat16")
TOKENS, DIM, WIDTH, SEED = 1024, 16, 8, 0
NUDGES, JUMP = 8, 0.25
"""How often the logits of the block are moved by the rounding of their product, to find tokens that it decides: by
which experts they have, or by a share of a weight."""
WEIGHT_BOUND, OUTPUT_BOUND = 1e-5, 2e-6
"""What float32 may reach: some roundings of a weight, and of sums of up to 24 products."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found of a family in one dtype."""

    others: int
    """Tokens of TOKENS whose experts are not those of moe_ref."""
    weight: float
    """The largest error of a weight, relative to the weight, where the experts are the same."""
    output: float | None
    """The largest error of the block's output, relative to the largest output; None: its block is not judged."""

    @property
    def router_agrees(self) -> bool:
        """Whether float32 explains what the router does."""
        return not self.others and self.weight <= WEIGHT_BOUND

    @property
    def block_agrees(self) -> bool:
        """Whether float32 explains what the block does."""
        return self.output is not None and self.output <= OUTPUT_BOUND


@cache
def stored() -> tuple[dict[str, str], dict[str, dict[str, Verified]]]:
    """(library -> version, family -> dtype -> what was found), as it was last measured."""
    held = json.loads(STORED.read_text())
    found = {
        name: {dtype: Verified(**values) for dtype, values in by_dtype.items()}
        for name, by_dtype in held["families"].items()
    }
    return held["libraries"], found


def store(libraries: dict[str, str], names: Iterable[str] = FAMILIES) -> None:
    """Measure and write."""
    found = {name: {dtype: asdict(each) for dtype, each in measure(name).items()} for name in names}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(by_dtype)}" for name, by_dtype in found.items())
    STORED.write_text(f'{{"libraries": {json.dumps(libraries)},\n "families": {{\n{rows}\n}}}}\n')


def measure(name: str) -> dict[str, Verified]:
    """dtype -> what the real router and block of a family do in it."""
    from conformance.subjects.transformers.subject import Transformers

    subject = Transformers(name, "eager")
    return {dtype: _measured(subject, name, dtype) for dtype in DTYPES}


def _measured(subject: "Transformers", name: str, dtype: str) -> Verified:
    others, weight = _router(subject, name, dtype)
    output = _block(subject, name, dtype) if name in BLOCKS else None
    # Two digits are what is shown, and what another machine finds again.
    shown = None if output is None else float(f"{output:.1e}")
    return Verified(others=others, weight=float(f"{weight:.1e}"), output=shown)


def _router(subject: "Transformers", name: str, dtype: str) -> tuple[int, float]:
    """(tokens with other experts, largest error of a weight) for logits of bfloat16, no two of a token equal."""
    family = FAMILIES[name]
    own = batch(family.tiny, tokens=2 * TOKENS, seed=SEED, expert_bias=family.expert_bias)
    if (scale := own.inputs.get("learned_scale")) is not None:  # as a checkpoint of that dtype has it
        own.inputs["learned_scale"] = rounded_to(scale, dtype)
    logits_TE = rounded_to(own.x_TD @ own.gate_ED.T, "bfloat16")
    # Who wins a tie is another question (SEL-5), and bfloat16 has many.
    distinct_T = np.flatnonzero((np.diff(np.sort(logits_TE, axis=1)) > 0).all(axis=1))[:TOKENS]
    logits_TE = logits_TE[distinct_T]
    inputs = {key: value[distinct_T] if key.endswith("_T") else value for key, value in own.inputs.items()}
    wanted = route(logits_TE, own.spec, expert_bias_E=own.expert_bias_E, **RouterInputs.keywords(inputs))
    found = subject.route(cast(logits_TE, dtype), own.spec, own.expert_bias_E, **inputs)
    found_TE = _by_expert(found.expert_ids_TK, found.weights_TK, own.spec.num_choices)
    wanted_TE = _by_expert(wanted.expert_ids_TK, wanted.weights_TK, own.spec.num_choices)
    same_T = (np.isnan(found_TE) == np.isnan(wanted_TE)).all(axis=1)
    error_TE = np.abs(found_TE - wanted_TE)[same_T] / np.abs(wanted_TE)[same_T]
    return int((~same_T).sum()), float(np.nanmax(error_TE, initial=0))


def _by_expert(expert_ids_TK, weights_TK, num_choices: int) -> np.ndarray:
    """(T, E) weights by expert; NaN where an expert is not chosen."""
    dense_TE = np.full((len(expert_ids_TK), num_choices), np.nan)
    np.put_along_axis(dense_TE, np.asarray(expert_ids_TK), np.asarray(weights_TK, np.float64), axis=1)
    return dense_TE


def _block(subject: "Transformers", name: str, dtype: str) -> float:
    """The largest error over tokens whose experts the rounding of the logits does not decide."""
    spec = BLOCKS[name].example(FAMILIES[name].tiny, DIM, WIDTH)
    drawn = LayerParams.init(spec, SEED)
    drawn = drawn if FAMILIES[name].expert_bias else replace(drawn, expert_bias_E=None)
    # The balancing bias of a checkpoint is float32: what a family makes of it is the family's.
    dtypes = {field: "float32" if field == "expert_bias_E" else dtype for field in drawn.by_name()}
    params = LayerParams(**{field: rounded_to(value, dtypes[field]) for field, value in drawn.by_name().items()})
    x_TD = rounded_to(np.random.default_rng(SEED).normal(size=(TOKENS, DIM)), dtype)
    wanted = moe_layer(x_TD, params, spec)
    kept_T = _decided(wanted, params, spec.router)
    x_TD = x_TD[kept_T]
    found_TD = np.asarray(subject.layer(cast(x_TD, dtype), params.astype(np.float32), spec), np.float64)
    return float(np.abs(found_TD - wanted.output_TD[kept_T]).max() / np.abs(wanted.output_TD).max())


def _decided(wanted: LayerTrace, params: LayerParams, spec: RouterSpec) -> np.ndarray:
    """(T,) whether a token keeps its experts where its logits move by a few roundings of bfloat16, and no weight jumps.

    The weights of sparsemixer jump where an expert enters the band.
    """
    routing = wanted.routing
    bias_E, scale = params.expert_bias_E, params.learned_scale
    own_TE = _by_expert(routing.expert_ids_TK, routing.weights_TK, spec.num_choices)
    reach_T1 = 2 * EPSILON["bfloat16"] * np.abs(routing.logits_TE).max(axis=1, keepdims=True)
    rng = np.random.default_rng(SEED)
    kept_T = np.ones(len(own_TE), bool)
    against_TE = np.ones(routing.logits_TE.shape)  # the chosen down, the others up, then at random: groups, bands
    np.put_along_axis(against_TE, routing.expert_ids_TK, -1.0, axis=1)
    for nudge_TE in (against_TE, *rng.choice((-1.0, 1.0), (NUDGES, *against_TE.shape))):
        moved = route(routing.logits_TE + nudge_TE * reach_T1, spec, expert_bias_E=bias_E, learned_scale=scale)
        moved_TE = _by_expert(moved.expert_ids_TK, moved.weights_TK, spec.num_choices)
        kept_T &= np.isclose(moved_TE, own_TE, rtol=JUMP, equal_nan=True).all(axis=1)
    return kept_T
