"""conformance, subjects: which specs a code base computes, as rows of data, and what it lacks of the others.

A row is a way in which its router routes. It says which fields of RouterSpec have which name in the config (`free`),
and which values others can have (`fixed`); all others are the identity.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from moe_ref import RouterSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A way in which a router routes, and the specs that it computes."""

    name: str
    config: dict[str, Any]
    """Entries of the config that it always has."""
    free: dict[str, str]
    """Field of RouterSpec -> name in the config."""
    fixed: dict[str, tuple] = field(default_factory=dict)
    """Field of RouterSpec -> the values that it can have."""
    expert_bias: bool = False
    """Whether it can have a balancing bias."""

    def inert(self, spec: RouterSpec) -> set[str]:
        """Fields that change nothing in this spec, so that it need not have them."""
        return inert_fields(spec)

    def mismatches(self, spec: RouterSpec) -> list[str]:
        """What it cannot do of this spec, as 'field (its values, not the wanted one)'; empty: it fits."""
        inert, found = self.inert(spec), []
        for each in fields(RouterSpec):
            name = each.name
            values, wanted = self.fixed.get(name, (each.default,)), getattr(spec, name)
            if name in inert or (name in self.free and name not in self.fixed) or wanted in values:
                continue
            found.append(f"{name} ({' or '.join(map(str, values))}, not {wanted})")
        return found

    def entries(self, values: dict[str, Any]) -> dict[str, Any]:
        """Entries of the config, from fields of RouterSpec."""
        return self.config | {config: values[name] for name, config in self.free.items() if name in values}


AnyRow = TypeVar("AnyRow", bound=Row)


def first_that_fits(
    rows: Iterable[AnyRow], spec: RouterSpec, *, expert_bias: bool, no_bias: str, called: str
) -> AnyRow:
    """The first row that computes a spec, with a balancing bias where one is wanted.

    Args:
        no_bias: what it says of a row that has no bias, where nothing else is amiss.
        called: what a row is called in the sentence, such as "block of MaxText".

    Raises:
        ValueError: there is none; the sentence says what the nearest one lacks.
    """
    missed = []
    for row in rows:
        found = row.mismatches(spec)
        if not found and (row.expert_bias or not expert_bias):
            return row
        missed.append((len(found), found or [no_bias], row.name))
    _, found, name = min(missed, key=lambda each: each[0])
    raise ValueError(f"the nearest {called}, {name}, has another {', '.join(found[:3])}")


def inert_fields(spec: RouterSpec) -> set[str]:
    """Fields that change nothing in this spec, so that no router needs to have them."""
    inert = set() if spec.selector == "sparsemixer" else {"mixer_eps"}
    if not spec.route_norm:
        inert |= {"norm_form", "norm_eps", "norm_p"}
    elif spec.norm_eps == 0:
        inert.add("norm_form")  # w / (sum + 0) is w / max(sum, 0)
    if spec.num_null_experts == 0:
        inert.add("null_kind")
    if spec.num_expert_groups in (None, spec.num_limited_groups):
        inert |= {"group_score_k", "mask_fill", "weights_from"}  # no group is dropped
    return inert
