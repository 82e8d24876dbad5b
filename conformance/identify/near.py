"""conformance, identify: the nearest specs to a router that fits none: what was fitted, and what is published."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from conformance.identify.box import Question
from conformance.identify.choice import Guess, Holder
from conformance.identify.equal import normal
from moe_ref import RouterSpec
from moe_ref.specs.families import FAMILIES
from moe_ref.specs.router_rules import WITHOUT_GROUPS

AS_NEAR = 1.25
"""What is published counts as nearest where it is not this many times further than what was fitted."""
OTHER_SCALE = 1.3
"""So much further counts a scale that was not measured."""


def nearest(holder: Holder, guesses: Sequence[Guess], questions: list[Question]) -> list[Guess]:
    """The nearest guesses, the nearest first; what is published stands before what is as near.

    Args:
        guesses: what was fitted, the best first.
        questions: the answers to be near to.
    """
    found = guesses[0].spec
    published = dict.fromkeys(
        normal(spec, holder.box.takes_bias)[0]
        for spec in _published(found)
        if spec.selector == found.selector and spec.num_logits == holder.box.columns
    )
    candidates = [*(Guess(spec=spec) for spec in published), *guesses]
    far = []
    for guess in candidates:
        measured = guess.spec.route_scale == found.route_scale
        try:
            far.append(holder.distance(guess, questions) * (1 if measured else OTHER_SCALE))
        except ValueError:  # it refuses what was asked
            far.append(np.inf)
    least = min(far)
    ranked = sorted(range(len(candidates)), key=lambda i: (far[i] > AS_NEAR * least, i >= len(published), far[i]))
    return [candidates[i] for i in ranked]


def _published(found: RouterSpec) -> Iterator[RouterSpec]:
    """The routers of the families, at the sizes of a spec, with its groups or none, its scale or their own."""
    sizes = {"num_experts": found.num_choices, "top_k": found.top_k, "num_null_experts": 0}
    groups = {name: getattr(found, name) for name in ("num_expert_groups", "num_limited_groups")}
    for family in FAMILIES.values():
        for scale in sorted({family.tiny.route_scale, found.route_scale}):
            for grouped in (groups, WITHOUT_GROUPS) if found.num_expert_groups else (WITHOUT_GROUPS,):
                with suppress(ValueError):
                    yield family.tiny.replace(**{**sizes, "route_scale": scale, **grouped})
