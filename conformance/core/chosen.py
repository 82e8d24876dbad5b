"""conformance, what a user chooses to have judged: one router, one layer, by family or by file, and how many tokens."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from conformance.core.usage import UsageError
from moe_ref import ExpertSpec, LayerSpec, RouterSpec
from moe_ref.specs.checks import nearest, require
from moe_ref.specs.families import preset
from moe_ref.specs.params import param_shapes

MOST_BYTES = 2**31
"""Of the parameters of a layer in float64: the reference computes with all of them, several times over."""

AnySpec = TypeVar("AnySpec")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Exactly these specs are judged, and nothing that is about others."""

    specs: tuple[RouterSpec | LayerSpec, ...]
    tokens: int | None = None
    """Of each case with more than one; None: as the requirements ask for."""

    def pool(self, kind: type[AnySpec]) -> list[AnySpec]:
        """Those of a kind of spec."""
        return [spec for spec in self.specs if isinstance(spec, kind)]

    def sizes(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of tokens of a check: those above 1 are the chosen one."""
        if self.tokens is None:
            return tokens
        return tuple(dict.fromkeys(self.tokens if size > 1 else size for size in tokens))


def pool_of(judge: Any, kind: type[AnySpec], pool: list[AnySpec]) -> list[AnySpec]:
    """The pool of a kind, or what the user chose of it."""
    return pool if judge.chosen is None else judge.chosen.pool(kind)


def tokens_of(judge: Any, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of tokens of a check, or what the user chose."""
    return tokens if judge.chosen is None else judge.chosen.sizes(tokens)


def router_of(words: list[str]) -> RouterSpec:
    """The router of a family at published size, with other values for some fields: deepseek_v3 num_experts=384.

    Raises:
        UsageError: an unknown family or field, with the nearest name, or a value that is none of the field.
    """
    name, *changes = [word for each in words for word in each.split(",")]
    try:
        router = preset(name)
        own, found = {field.name for field in fields(RouterSpec)}, {}
        for change in changes:
            field, equals, value = change.partition("=")
            require(bool(equals), f"{change!r} is no override; it is field=value, such as num_experts=384")
            require(field in own, f"unknown field {field!r} of RouterSpec{nearest(field, own)}")
            found[field] = _value(value)
        return router.replace(**found)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False, "-inf": -np.inf}
    if text.lower() in words:
        return words[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def chosen(
    *,
    family: list[str] | None = None,
    file: Path | None = None,
    tokens: int | None = None,
    width: list[int] | None = None,
) -> Chosen | None:
    """What the options of a run name; None where they name nothing.

    Args:
        family: as in `router_of`.
        file: JSON of a RouterSpec, or of a LayerSpec, whose router is judged too.
        tokens: of each case.
        width: (dim, hidden_dim) of the layer in place of its own; with a family, a layer of it is judged as well.

    Raises:
        UsageError: what is named cannot be judged; it says why.
    """
    if family is None and file is None:
        if tokens is not None or width is not None:
            raise UsageError("--tokens and --width belong to --family or --spec")
        return None
    if family is not None and file is not None:
        raise UsageError("one of --family and --spec names what is judged, not both")
    router, layer = (router_of(family), None) if family is not None else _read(file)
    try:
        if width is not None:
            dim, hidden_dim = width
            if layer is None:
                layer = LayerSpec(router=router, experts=ExpertSpec(dim=dim, hidden_dim=hidden_dim))
            else:
                layer = layer.replace(experts=layer.experts.replace(dim=dim, hidden_dim=hidden_dim))
    except ValueError as error:
        raise UsageError(f"--width: {error}") from None
    if layer is None:
        return Chosen(specs=(router,), tokens=tokens)
    size = sum(8 * int(np.prod(shape)) for shape in param_shapes(layer).values() if shape is not None)
    if size > MOST_BYTES:
        raise UsageError(
            f"the parameters of this layer take {size / 2**30:.0f} GiB in float64, more than {MOST_BYTES / 2**30:.0f}; "
            "--width DIM HIDDEN_DIM judges it narrower"
        )
    return Chosen(specs=(router, layer), tokens=tokens)


def _read(file: Path | None) -> tuple[RouterSpec, LayerSpec | None]:
    assert file is not None
    try:
        data = json.loads(file.read_text())
        require(isinstance(data, dict), "it is no JSON object")
        if "router" in data:
            layer = LayerSpec.from_dict(data)
            return layer.router, layer
        return RouterSpec.from_dict(data), None
    except OSError as error:
        raise UsageError(f"spec {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"spec {file}: {error}") from None
