"""conformance, identify: the names of a spec. Which families of public models have its router, or nearly."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from conformance.identify.equal import normal
from conformance.identify.search import Identity
from moe_ref import RouterSpec
from moe_ref.specs.families import FAMILIES

NUMBERS = ("route_scale", "logit_scale", "logit_softcap", "norm_eps", "mixer_eps", "router_dtype")
"""What the config of a model sets; families with other values compute the same otherwise."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """The families of a spec."""

    exact: list[str]
    """Those whose router has this normal form at the box's sizes."""
    other_numbers: dict[str, str]
    """Name -> the numbers in which it differs."""
    nearest: dict[str, str]
    """Where none is exact: name -> the fields in which it differs, the fewest first."""


def families_of(found: Identity) -> Named:
    """The families whose router, with the sizes of the box, is the one that was found."""
    spec, takes = found.spec, found.box.takes_bias and found.guess.bias_used
    exact, numbers_, nearest = [], {}, {}
    for name, family in FAMILIES.items():
        # Its tiny router has the settings that the published one leaves off, such as groups.
        differing = [_differing(spec, each, takes) for each in (family.router, family.tiny)]
        least = min(differing, key=len)
        if not least:
            exact.append(name)
        elif set(least) <= set(NUMBERS):
            numbers_[name] = shown_fields(least)
        elif "sizes" not in least:
            nearest[name] = shown_fields(least)
    fewest = min((text.count("=") for text in nearest.values()), default=0)
    near = {name: text for name, text in nearest.items() if text.count("=") == fewest}
    return Named(exact=exact, other_numbers=numbers_, nearest={} if exact or numbers_ else near)


def _differing(spec: RouterSpec, other: RouterSpec, takes_bias: bool) -> dict[str, Any]:
    """Field -> the value of another router, in whatever its normal form differs at the sizes of this one."""
    sizes: dict[str, Any] = {name: getattr(spec, name) for name in ("top_k", "num_scored_shared_experts")}
    grouped = spec.num_expert_groups is not None and (other.num_expert_groups or 1) > 1
    if grouped:
        sizes |= {name: getattr(spec, name) for name in ("num_expert_groups", "num_limited_groups")}
    null = min(other.num_null_experts, spec.num_choices - 1)
    sizes |= {"num_experts": spec.num_choices - null, "num_null_experts": null}
    if not other.num_scored_shared_experts:
        sizes["num_scored_shared_experts"] = 0
    try:
        own, others = normal(spec, takes_bias)[0], normal(other.replace(**sizes), takes_bias)[0]
    except ValueError:  # it has no router of these sizes
        return {"sizes": "others"}
    found = {each.name: getattr(others, each.name) for each in fields(own)}
    return {name: value for name, value in found.items() if not _alike(value, getattr(own, name))}


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float) and np.isfinite([value, other]).all():
        return abs(value - other) <= 1e-4 * max(abs(value), abs(other))
    return value == other


def shown_fields(values: dict[str, Any]) -> str:
    """Fields and values in one line."""
    return " ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
