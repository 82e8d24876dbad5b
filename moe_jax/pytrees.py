"""moe_jax, pytrees: the data types that a program takes and returns, as trees of arrays, for `jax.export` too."""

from dataclasses import fields
from typing import TypeVar

import jax
import jax.export  # jax alone does not import it

from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.params import LayerParams

Kind = TypeVar("Kind", bound=type)


def tree_of_arrays(kind: Kind) -> Kind:
    """A dataclass of which every field is an array or a tree of them, for jit and for `jax.export`'s serialize."""
    jax.tree_util.register_dataclass(kind, data_fields=[field.name for field in fields(kind)], meta_fields=[])
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"moe_jax.{kind.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
    return kind


# Those of moe_ref, so that one class is used in every room.
for _kind in (LayerParams, RouterInputs):
    tree_of_arrays(_kind)
