"""moe_jax, rows: tokens become the rows of their slots, and rows sums of their slots; gathers in every derivative.

Both are parts of one form, linear in each of three arrays: the sum over slots of weight * <row of the slot, token>. Of
two of its arrays each product is a primitive of JAX, and the derivatives of one, of any order, forward and in reverse,
are the others; what JAX would derive from a gather is a scatter, whose order of summation is not fixed.

    spread_p    tokens, weights -> rows
    gather_p    rows, weights   -> tokens
    dot_p       rows, tokens    -> weights

Legend: T tokens, D width of a row, K top_k, R rows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from moe_jax.arrays import array_like, column, take, vary_alike, wide_dtype
from moe_jax.linear import jvp_in_each
from moe_jax.permute import RouteMetadata


def dispatch(x_TD: jax.Array, metadata: RouteMetadata) -> jax.Array:
    """A row is the token of its slot; any (T, ...) array can be dispatched.

    Rows of the tail hold tokens too, and their gradient is not read.

    Returns:
        rows_RD: (R, D), in the order of `metadata.slot_of_row_R`.
    """
    return _bind(spread_p, [x_TD], metadata, masked=False)


def unpermute(rows_RD: jax.Array, metadata: RouteMetadata, weights_TK: jax.Array | None = None) -> jax.Array:
    """A token's output is the weighted sum of its slots' rows, in slot order; rows of the tail are 0 in it.

    Args:
        rows_RD: (R, D), in the order of `dispatch`.
        weights_TK: (T, K); None is all ones.

    Returns:
        output_TD: (T, D), in the dtype of the rows; summed in float32 at least.
    """
    return _bind(gather_p, [rows_RD] if weights_TK is None else [rows_RD, weights_TK], metadata)


def _bind(product: Primitive, arrays: list, metadata: RouteMetadata, **static: Any) -> jax.Array:
    own, tree = jax.tree.flatten(metadata)
    operands = vary_alike(*map(jnp.asarray, arrays), *own)
    return product.bind(*operands, tree=tree, dtype=operands[0].dtype, lead=0, **static)


# the three products


def _spread(arrays, metadata: RouteMetadata, dtype, masked: bool):
    """The gradients of rows of the tail are 0."""
    rows_RD = take(arrays[0], metadata.token_of_row_R)
    if not masked:
        return metadata.blank(rows_RD).astype(dtype)
    own_R1 = column(metadata.has_expert_R, rows_RD.ndim)
    rows_RD = jnp.where(own_R1, rows_RD, 0)
    if len(arrays) > 1:
        rows_RD = jnp.where(own_R1, rows_RD * metadata.of_rows(arrays[1])[:, None], 0)
    return rows_RD.astype(dtype)


def _gather(arrays, metadata: RouteMetadata, dtype):
    """One gather per slot, which the compiler fuses with the sum: no (T, K, D) array."""
    rows_RD, weights_TK = arrays[0], arrays[1] if len(arrays) > 1 else None
    T, K = metadata.row_of_slot_TK.shape
    wide = wide_dtype(*(array.dtype for array in arrays))
    output_TD = jnp.zeros((T, *rows_RD.shape[1:]), wide)
    for slot in range(K):
        # Selected, not multiplied by a weight of 0: the tail may hold NaN.
        own_T1 = column(metadata.has_expert_TK[:, slot], rows_RD.ndim)
        rows_TD = jnp.where(own_T1, take(rows_RD, metadata.row_of_slot_TK[:, slot]), 0).astype(wide)
        output_TD += rows_TD if weights_TK is None else rows_TD * weights_TK[:, slot, None].astype(wide)
    return output_TD.astype(dtype)


def _dot(arrays, metadata: RouteMetadata, dtype):
    rows_RD, tokens_TD = arrays
    own_R1, wide = metadata.has_expert_R[:, None], wide_dtype(rows_RD.dtype, tokens_TD.dtype)
    of_rows_RD = jnp.where(own_R1, take(tokens_TD, metadata.token_of_row_R), 0).astype(wide)
    products_R = (jnp.where(own_R1, rows_RD, 0).astype(wide) * of_rows_RD).sum(axis=-1)
    return jnp.where(metadata.has_expert_TK, take(products_R, metadata.row_of_slot_TK), 0).astype(dtype)


spread_p, gather_p, dot_p = Primitive("rows_of_tokens"), Primitive("tokens_of_rows"), Primitive("weights_of_rows")
_COMPUTED = {spread_p: _spread, gather_p: _gather, dot_p: _dot}


def _compute(product: Primitive, *operands, tree, dtype, lead: int, **static):
    """The product, of each example of the batches of `lead` vmaps."""

    def one(*operands):
        count = len(operands) - tree.num_leaves
        return _COMPUTED[product](operands[:count], jax.tree.unflatten(tree, operands[count:]), dtype, **static)

    for _ in range(lead):
        one = jax.vmap(one)
    return one(*operands)


def _shape(product: Primitive, *operands, tree, dtype, lead: int, **static):
    first, metadata = operands[0], jax.tree.unflatten(tree, operands[len(operands) - tree.num_leaves :])
    batch, width = first.shape[:lead], first.shape[lead + 1 :]
    slots = metadata.row_of_slot_TK.shape[lead:]
    shape = {spread_p: (*metadata.slot_of_row_R.shape[lead:], *width), gather_p: (slots[0], *width), dot_p: slots}
    return array_like(first, (*batch, *shape[product]), dtype)


# their derivatives


def _transpose(product: Primitive):
    """Of the form's three arrays, of which two are in a product, the gradient of one is the product of the others."""

    def rule(d_out, *operands, tree, lead: int, **_):
        count = len(operands) - tree.num_leaves
        nothing: list[Any] = [None] * len(operands)
        if type(d_out) is ad.Zero:
            return nothing
        own, (at,) = operands[count:], [n for n in range(count) if ad.is_undefined_primal(operands[n])]
        bind = partial(_bind_again, tree=tree, dtype=operands[at].aval.dtype, lead=lead)
        others = [operands[n] for n in range(count) if n != at]
        if product is spread_p:
            nothing[at] = bind(dot_p, d_out, *others, *own) if at else bind(gather_p, d_out, *others, *own)
        elif product is gather_p:
            nothing[at] = bind(dot_p, *others, d_out, *own) if at else bind(spread_p, d_out, *others, *own)
        else:
            nothing[at] = bind(gather_p, *others, d_out, *own) if at else bind(spread_p, *others, d_out, *own)
        return nothing

    return rule


def _bind_again(product: Primitive, *operands, **static):
    return product.bind(*operands, **static, **({"masked": True} if product is spread_p else {}))


def _batched(product: Primitive):
    def rule(arrays, axes, *, lead: int, **static):
        size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
        moved = [
            jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
            for a, axis in zip(arrays, axes, strict=True)
        ]
        return product.bind(*moved, lead=lead + 1, **static), 0

    return rule


for _product in _COMPUTED:
    _computed = partial(_compute, _product)
    _product.def_impl(jax.jit(_computed, static_argnames=("tree", "dtype", "lead", "masked")))
    _product.def_abstract_eval(partial(_shape, _product))
    # The tail of a tangent reaches nothing, as that of a row.
    ad.primitive_jvps[_product] = jvp_in_each(_product, lambda static: static["tree"].num_leaves)
    ad.primitive_transposes[_product] = _transpose(_product)
    batching.primitive_batchers[_product] = _batched(_product)
    mlir.register_lowering(_product, mlir.lower_fun(_computed, multiple_results=False))
