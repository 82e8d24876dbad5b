"""moe_jax, explicit: where the axes of a mesh are explicit, a function runs in auto mode, and says how its result lies.

An explicit axis is a part of an array's type, and a type says nothing of rows sorted by expert: which device has one
depends on the choice. So the compiler partitions the function, as it does everywhere else in auto mode.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AxisType, PartitionSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def by_token(lies: PartitionSpec) -> PartitionSpec:
    """What is said of T tokens lies as they do; where more axes of (..., D) than the first are sharded over, it is on
    every device."""
    return PartitionSpec(lies[0]) if len(lies) > 1 and not any(lies[1:-1]) else PartitionSpec()


def everywhere(_: PartitionSpec) -> PartitionSpec:
    """What is of all tokens together is on every device."""
    return PartitionSpec()


def output_and_choice(lies: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
    """The output of a layer lies as its tokens (..., D), and what it says of them by token."""
    return lies, by_token(lies)


def in_any_mode(result: Callable[[PartitionSpec], Any]) -> Callable[[Function], Function]:
    """Makes a function one that runs under a mesh of explicit axes too, over which its arrays may be sharded.

    Args:
        result: how the result lies, where the function's first argument lies so.

    Raises:
        ValueError: the mesh of these axes is not set.
    """

    def of(function: Function) -> Function:
        first = next(iter(inspect.signature(function).parameters))

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                for place in places:
                    if any(over := jax.typeof(leaves[place]).sharding.spec):
                        name = function.__name__
                        raise ValueError(
                            f"an array is {over} of an explicit mesh; call {name} under jax.set_mesh of it"
                        )
            if AxisType.Explicit not in mesh.axis_types:  # those of auto and manual mode are not part of a type
                return function(*args, **kwargs)

            def run(*arrays):
                found = list(leaves)
                for place, array in zip(places, arrays, strict=True):
                    found[place] = array
                own_args, own_kwargs = jax.tree.unflatten(tree, found)
                return function(*own_args, **own_kwargs)

            lies = jax.typeof(args[0] if args else kwargs[first]).sharding.spec
            return jax.sharding.auto_axes(run, out_sharding=result(lies))(*[leaves[place] for place in places])

        return cast(Function, called)

    return of
