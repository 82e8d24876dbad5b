"""conformance, vectors: the calls of a subject. One that writes down what it is asked, and one that reads its answers.

Both take part in an ordinary check: the first says which calls a requirement makes, the second has the judge look at
answers that were computed elsewhere.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np

from conformance.core.capabilities import METHODS
from conformance.core.subject import Routing, Subject, Unsupported
from conformance.subjects.reference import Reference
from conformance.vectors.container import laid_out, packed, to_json, unpacked
from moe_ref import RoutingRecord

UNANSWERED = "there is no answer to one of its calls"
UNREAD = ("buffer_fill",)
"""Inputs that change no result: what unread rows of a buffer hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a method of a subject."""

    method: str
    arguments: Mapping[str, Any]
    """By the names that `conformance.subjects.reference` has for them; None is left out."""

    @cached_property
    def _packed(self) -> tuple[Any, dict[str, np.ndarray]]:
        tensors: dict[str, np.ndarray] = {}
        return packed(self.arguments, "", tensors), tensors

    @property
    def json(self) -> Any:
        """The arguments, with names in place of arrays."""
        return self._packed[0]

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays of the arguments by name."""
        return self._packed[1]

    @cached_property
    def key(self) -> str:
        """Names the call: hex digits of all that it says."""
        entries, data = laid_out(self.tensors)
        return hashlib.sha256(to_json([self.method, self.json, entries]) + data).hexdigest()


def made(subject: Subject, method: str, arguments: Mapping[str, Any]) -> Any:
    """What a subject returns for arguments by name; one that it needs and that is not there is None."""
    parameters = inspect.signature(getattr(Reference, method)).parameters.values()
    needed = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    first = [arguments.get(name) for name in needed if name != "self"]
    return getattr(subject, method)(*first, **{n: value for n, value in arguments.items() if n not in needed})


def call_of(method: str, arguments: tuple, inputs: Mapping[str, Any]) -> Call:
    """The call with its arguments by name."""
    signature = inspect.signature(getattr(Reference, method))
    names = [name for name in signature.parameters if name != "self"]
    given = dict(zip(names, arguments, strict=False)) | dict(inputs)
    kept = {name: value for name, value in given.items() if value is not None and name not in UNREAD}
    return Call(method=method, arguments=kept)


WHOLE = {
    "gate": "logits_TE", "experts": "output_RD", "combine": "output_TD", "layer": "output_TD", "replay": "output_TD",
    "load": "tokens_per_expert_E", "bias_update": "expert_bias_E", "dispatch": "ranks", "sharded_layer": "outputs",
    "sharded_gradients": "ranks", "train": "states", "upcycled_layer": "output_TD",
}  # fmt: skip
"""The name of what a method returns, where that is one array, or a list of one thing for each rank or event."""


def by_name(method: str, returned: Any) -> dict[str, Any]:
    """What a method returned, as arrays by name; a number is an array without axes."""
    if method in WHOLE:
        returned = {WHOLE[method]: returned}
    elif method == "permute":
        returned = dict(zip(("order_N", "tokens_per_expert_E"), returned, strict=True))
    elif method == "record":
        returned = returned.to_arrays()
    elif method == "configure":
        returned = {}
    return _arrays(returned)


def _arrays(value: Any) -> Any:
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _arrays(each) for name, each in value.items() if each is not None}
    return [_arrays(each) for each in value] if isinstance(value, (list, tuple)) else np.asarray(value)


def returned_of(call: Call, found: dict[str, Any]) -> Any:
    """What the method returns that has these arrays; `by_name` the other way."""
    if call.method in WHOLE:
        return found[WHOLE[call.method]]
    if call.method == "permute":
        return found["order_N"], found["tokens_per_expert_E"]
    if call.method == "record":
        return RoutingRecord.from_arrays(found, call.arguments["spec"].router)
    return Routing(**found) if call.method == "route" else found


def _asked(method: str) -> Callable:
    """A method that asks `answered` of its class."""

    @wraps(getattr(Reference, method))  # its signature says which inputs it takes
    def answer(self: Any, *arguments: Any, **inputs: Any) -> Any:
        return self.answered(call_of(method, arguments, inputs), arguments, inputs)

    return answer


class Asked(Reference):
    """The reference with every method asking `answered`; its logits are in float32."""

    name, logit_dtypes = "vectors", ("float32",)

    def answered(self, call: Call, arguments: tuple, inputs: Mapping[str, Any]) -> Any:
        """What the method returns."""
        raise NotImplementedError


for _method in METHODS:
    setattr(Asked, _method, _asked(_method))


@dataclass(eq=False)
class Recorder(Asked):
    """Writes down each call, and answers as another subject does."""

    subject: Any = field(default_factory=Reference)
    calls: list[Call] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    """What it answered, by the key of the call; an error is none."""

    @property
    def keys(self) -> list[str]:
        """Of the calls, in order."""
        return [call.key for call in self.calls]

    def answered(self, call: Call, arguments: tuple, inputs: Mapping[str, Any]) -> Any:
        self.calls.append(call)
        if call.key not in self.answers:
            self.answers[call.key] = getattr(self.subject, call.method)(*arguments, **inputs)
        return deepcopy(self.answers[call.key])


@dataclass(eq=False)
class Answers(Asked):
    """Reads its answers: tensors by the key of a call, and what is made of them."""

    tensors: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    returns: Mapping[str, Any] = field(default_factory=dict)
    name = "the answers"

    def answered(self, call: Call, arguments: tuple, inputs: Mapping[str, Any]) -> Any:
        if call.key not in self.tensors:
            raise Unsupported(UNANSWERED)
        try:
            return returned_of(call, unpacked(self.returns[call.key], self.tensors[call.key]))
        except (KeyError, TypeError) as missing:
            raise Unsupported(f"the answer is not whole: {missing}") from None
