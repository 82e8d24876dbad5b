"""moe_jax, grouped matmul: rows sorted by expert, each multiplied by the matrix of its expert.

Rows beyond sum(group_sizes_E), the tail, come out as exactly 0 and reach no gradient, whatever they hold.

Two products are enough for it and for all of its derivatives, of any order: of rows with matrices, and of rows with
rows. Each is a primitive of JAX, linear in both of its arrays, whose ways are chosen where it is lowered (`choice`).

Legend: R rows, D width in, F width out, E experts, I and O the widths in and out of a product.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike, DTypeLike

from moe_jax import blocked, ragged
from moe_jax.arrays import array_like, vary_alike
from moe_jax.choice import WAYS, Chosen, chosen, computed_in, named, say_once
from moe_jax.explicit import by_token, in_any_mode
from moe_jax.linear import jvp_in_each, one_by_one

IMPLEMENTATIONS = ("auto", *WAYS)
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Options(NamedTuple):
    """What is static: hashable, and the same forward and backward."""

    precision: Any
    implementation: str


@in_any_mode(by_token)
def grouped_matmul(
    rows_RD: ArrayLike,
    kernel_EDF: ArrayLike,
    group_sizes_E: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str = "auto",
    group_offset: ArrayLike | None = None,
) -> jax.Array:
    """Each row is multiplied by the matrix of its expert; rows of the tail are exactly 0.

    Sums are in float32 at least. The gradient of the kernel is exactly 0 for an expert without rows. Differentiable
    any number of times, forward and in reverse.

    Args:
        rows_RD: (R, D) floats, sorted by expert.
        kernel_EDF: (E, D, F) floats.
        group_sizes_E: (E,) integers, rows of each expert; where their sum exceeds R the last groups are cut off.
        precision: as in jax.lax.dot.
        preferred_element_type: dtype of the result; None is that of rows and kernel.
        implementation: blocked, ragged, tokamax, or auto, which is what `moe_jax.chosen` says: blocked on CPU,
            and where it is compiled for CUDA the kernels of tokamax or else blocked, with a warning that says why.
            With tokamax on CUDA a row that is not finite may reach the gradient of the experts whose rows are next.
        group_offset: an integer, () or (1,): the group of the first matrix, where group_sizes_E has (G,) of which
            kernel_EDF holds E from there on, as jax.lax.ragged_dot names it. Rows of the other groups come out as 0.
            It is in [0, G - E]. The rows are moved there and back, a copy each.

    Returns:
        rows_RF: (R, F).
    """
    rows_RD, kernel_EDF, group_sizes_E = jnp.asarray(rows_RD), jnp.asarray(kernel_EDF), jnp.asarray(group_sizes_E)
    if group_offset is not None:
        offset, sizes_G, E = jnp.asarray(group_offset).reshape(()), group_sizes_E, kernel_EDF.shape[0]
        if sizes_G.ndim != 1 or sizes_G.shape[0] < E or not jnp.issubdtype(offset.dtype, jnp.integer):
            found = f"{offset.dtype}, with group_sizes_E of {list(sizes_G.shape)}"
            raise ValueError(f"group_offset is {found}; it is an integer, and there are groups for all {E} matrices")
        if not isinstance(offset, Tracer) and not 0 <= int(offset) <= sizes_G.shape[0] - E:
            raise ValueError(f"group_offset is {offset}; it is between 0 and {sizes_G.shape[0] - E}")
        ends_G = jnp.minimum(jnp.cumsum(sizes_G, dtype=jnp.int32), rows_RD.shape[0])
        own_E = lax.dynamic_slice_in_dim(jnp.diff(ends_G, prepend=jnp.int32(0)), offset, E)
        # Other groups come to lie behind the own ones, in the tail.
        start = jnp.where(offset > 0, ends_G[jnp.maximum(offset - 1, 0)], 0)
        moved_RF = grouped_matmul(
            jnp.roll(rows_RD, -start, axis=0), kernel_EDF, own_E, precision=precision,
            preferred_element_type=preferred_element_type, implementation=implementation,
        )  # fmt: skip
        return jnp.roll(moved_RF, start, axis=0)
    _check(rows_RD, kernel_EDF, group_sizes_E, implementation)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(rows_RD.dtype, kernel_EDF.dtype))
    options = Options(lax.Precision(precision) if isinstance(precision, str) else precision, implementation)
    arrays = vary_alike(rows_RD, kernel_EDF, group_sizes_E.astype(jnp.int32))
    return matmul_p.bind(*arrays, contract=0, out_dtype=out_dtype, options=options)


# the two products

matmul_p = Primitive("grouped_matmul")
"""rows_RI, kernel_EDF, group_sizes_E -> rows_RO; `contract` is the axis of a matrix, 0 or 1, that is summed over."""
outer_p = Primitive("grouped_outer")
"""rows_RD, rows_RF, group_sizes_E -> (E, D, F), each expert's sum of the outer products of its rows."""


@matmul_p.def_abstract_eval
def _(rows_RI, kernel_EDF, group_sizes_E, *, contract: int, out_dtype, options: Options):
    return array_like(rows_RI, (rows_RI.shape[0], kernel_EDF.shape[2 - contract]), out_dtype)


@outer_p.def_abstract_eval
def _(rows_RD, rows_RF, group_sizes_E, *, out_dtype, options: Options):
    return array_like(rows_RD, (*group_sizes_E.shape, rows_RD.shape[1], rows_RF.shape[1]), out_dtype)


@partial(jax.jit, static_argnames=("contract", "out_dtype", "options"))
def _matmul_alone(*arrays, **static):
    return matmul_p.bind(*arrays, **static)


@partial(jax.jit, static_argnames=("out_dtype", "options"))
def _outer_alone(*arrays, **static):
    return outer_p.bind(*arrays, **static)


matmul_p.def_impl(_matmul_alone)
outer_p.def_impl(_outer_alone)


# their derivatives


def _matmul_transpose(d_rows_RO, rows_RI, kernel_EDF, group_sizes_E, *, contract: int, out_dtype, options: Options):
    if type(d_rows_RO) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(rows_RI):
        static = {"contract": 1 - contract, "out_dtype": rows_RI.aval.dtype, "options": options}
        return matmul_p.bind(d_rows_RO, kernel_EDF, group_sizes_E, **static), None, None
    sides = (rows_RI, d_rows_RO) if contract == 0 else (d_rows_RO, rows_RI)
    return None, outer_p.bind(*sides, group_sizes_E, out_dtype=kernel_EDF.aval.dtype, options=options), None


def _outer_transpose(d_out_EDF, rows_RD, rows_RF, group_sizes_E, *, out_dtype, options: Options):
    if type(d_out_EDF) is ad.Zero:
        return None, None, None
    is_left = ad.is_undefined_primal(rows_RD)
    asked, given = (rows_RD, rows_RF) if is_left else (rows_RF, rows_RD)
    static = {"contract": int(is_left), "out_dtype": asked.aval.dtype, "options": options}
    found = matmul_p.bind(given, d_out_EDF, group_sizes_E, **static)
    return (found, None, None) if is_left else (None, found, None)


for _product, _transpose in ((matmul_p, _matmul_transpose), (outer_p, _outer_transpose)):
    ad.primitive_jvps[_product] = jvp_in_each(_product, lambda _: 1)
    ad.primitive_transposes[_product] = _transpose
    batching.primitive_batchers[_product] = one_by_one(_product)  # the groups of a batch differ


# their ways


def _matmul_rule(platform: str, context, *operands, contract: int, out_dtype, options: Options):
    found = _way(platform, context.avals_in, out_dtype, options)
    product = {
        "blocked": partial(
            blocked.rows_times_matrices, precision=options.precision, block_sizes=blocked.sizes_on(platform)
        ),
        "ragged": partial(ragged.rows_times_matrices, precision=options.precision),
        "tokamax": partial(ragged.tokamax_rows_times_matrices, kernel=found.kernel),
    }[found.way]
    return _lowered(partial(product, contract=contract, out_dtype=out_dtype), found.way, context, *operands)


def _outer_rule(platform: str, context, *operands, out_dtype, options: Options):
    found = _way(platform, context.avals_in, out_dtype, options)
    way = "blocked" if found.weight_gradient == "blocked" else found.way
    product = {
        "blocked": partial(
            blocked.rows_times_rows, precision=options.precision, block_sizes=blocked.sizes_on(platform)
        ),
        "ragged": partial(ragged.rows_times_rows, precision=options.precision),
        "tokamax": partial(ragged.tokamax_rows_times_rows, kernel=found.weight_gradient),
    }[way]
    return _lowered(partial(product, out_dtype=out_dtype), way, context, *operands)


def _way(platform: str, avals, out_dtype, options: Options) -> Chosen:
    """The one place where a platform is told from another, at lowering time."""
    a, b, _ = avals
    if options.implementation != "auto":
        return named(options.implementation, platform)
    found = chosen(platform, dtype=computed_in(a.dtype, b.dtype, out_dtype))
    if platform == "cuda":
        say_once(found)
    return found


def _lowered(product, way: str, context, *operands):
    with ragged.without_types_of_meshes() if way == "tokamax" else nullcontext():
        return mlir.lower_fun(product, multiple_results=False)(context, *operands)


for _product, _rule in ((matmul_p, _matmul_rule), (outer_p, _outer_rule)):
    for _platform in PLATFORMS:
        mlir.register_lowering(_product, partial(_rule, _platform), platform=_platform)


# checks


def _check(rows_RD, kernel_EDF, group_sizes_E, implementation: str):
    for field, array, ndim in (("rows_RD", rows_RD, 2), ("kernel_EDF", kernel_EDF, 3)):
        if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{field} is {array.dtype}{list(array.shape)}; it is floats of {ndim} axes")
    E, D, _ = kernel_EDF.shape
    if rows_RD.shape[1] != D:
        raise ValueError(f"rows_RD has width {rows_RD.shape[1]}; kernel_EDF takes {D}")
    if group_sizes_E.shape != (E,) or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        found = f"{group_sizes_E.dtype}{list(group_sizes_E.shape)}"
        raise ValueError(f"group_sizes_E is {found}; it is {E} integers, one per matrix of kernel_EDF")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, not one of {IMPLEMENTATIONS}")
