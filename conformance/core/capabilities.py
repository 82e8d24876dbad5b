"""conformance, capabilities: which methods a subject defines, and which inputs each of them names."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Unpack, get_args, get_origin

from conformance.core.subject import Subject

METHODS = (
    "route", "gate", "configure", "permute", "align", "experts", "combine", "layer", "layer_gradients",
    "place_slots", "home", "fused_layer", "upcycled_layer",
    "dispatch", "sharded_layer", "sharded_gradients",
    "load", "balance_loss", "z_loss", "bias_update", "quantile_update", "next_coefficient", "capacity", "record",
    "replay", "train",
)  # fmt: skip


def capabilities(subject: Subject) -> set[str]:
    """Names of the optional methods that the subject defines."""
    return {name for name in METHODS if getattr(type(subject), name) is not getattr(Subject, name)}


def named_inputs(subject: Subject, method: str) -> set[str]:
    """The parameters that a method names; where it has `**inputs`, those of the one that it overrides too.

    With `**inputs: Unpack[SomeTypedDict]` they are those of the typed dict.
    """
    found: set[str] = set()
    defined = [vars(cls)[method] for cls in type(subject).__mro__ if method in vars(cls) and cls is not Subject]
    for function in ([getattr(subject, method)] if method in vars(subject) else []) + defined:
        parameters = _signature(function).parameters
        found |= parameters.keys()
        rest = next((each.annotation for each in parameters.values() if each.kind is each.VAR_KEYWORD), None)
        if get_origin(rest) is Unpack:
            return found | get_args(rest)[0].__annotations__.keys()
        if rest is None:
            break
    return found


@lru_cache(maxsize=256)
def _signature(function: Callable) -> inspect.Signature:
    return inspect.signature(function)  # each call of a subject asks
