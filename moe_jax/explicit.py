"""moe_jax, explicit: where the axes of a mesh are explicit, a layer runs in auto mode and returns what lies as x does.

An explicit axis is a part of an array's type, and a type says nothing of rows sorted by expert: which device has one
depends on the choice. So the compiler partitions the layer, as it does everywhere else in auto mode.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax
from jax.sharding import PartitionSpec

Layer = TypeVar("Layer", bound=Callable[..., Any])


def in_any_mode(layer: Layer) -> Layer:
    """The layer of tokens x, (..., D), its first argument, for arrays that are sharded over explicit axes too.

    Its output lies as x does, and what it says of T tokens as they do; where more axes of x than its first are sharded
    over, that is on every device.

    Raises:
        ValueError: the mesh of these axes is not set.
    """

    @wraps(layer)
    def called(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
        if not any(_sharded(leaves[place]) for place in places):
            return layer(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        if jax.sharding.get_abstract_mesh().empty:
            over = jax.typeof(next(leaves[at] for at in places if _sharded(leaves[at]))).sharding.spec
            raise ValueError(f"an array is {over} of an explicit mesh; call the layer under jax.set_mesh of that mesh")

        def run(*arrays):
            found = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                found[place] = array
            own_args, own_kwargs = jax.tree.unflatten(tree, found)
            return layer(*own_args, **own_kwargs)

        lies = jax.typeof(x).sharding.spec
        by_token = PartitionSpec(lies[0]) if len(lies) > 1 and not any(lies[1:-1]) else PartitionSpec()
        return jax.sharding.auto_axes(run, out_sharding=(lies, by_token))(*[leaves[place] for place in places])

    return cast(Layer, called)


def _sharded(array: jax.Array) -> bool:
    """Whether its type says so: axes of auto and manual mode are not part of it."""
    return any(part is not None for part in jax.typeof(array).sharding.spec)
