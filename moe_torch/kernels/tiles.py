"""moe_torch, kernels: the table of tiles, and what every kernel of the experts does with a tile.

Rows are sorted by expert. A tile is up to ROWS of them, all of one expert: (expert, first row, end row). The rows after
those of the last expert are of nobody; their tiles have the number of experts in place of an expert, and whoever writes
rows writes zeros there. The table stays on the device: nothing waits for the host.

Legend: R rows, E experts, B tiles.
"""

import triton.language as tl

from moe_torch.kernels.jit import jit


def most_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """B, enough for any counts, and for some just so: each expert with a row, and nobody, has one tile with one row."""
    owners = min(num_experts + 1, num_rows)
    return owners + (num_rows - owners) // rows


@jit(do_not_specialize=["num_rows", "num_tiles"])
def table_kernel(
    counts_E, tiles_3B, ends_E, num_rows, num_experts, num_tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """tiles_3B: expert, first row and end row of each tile; ends_E: cumsum(counts_E).

    A program writes TILES of them; EXPERTS is a power of two above E.
    """
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(counts_E + experts, mask=experts < num_experts, other=0).to(tl.int32)
    tiles_of = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(counts, 0)
    last_tile = tl.cumsum(tiles_of, 0)
    if tl.program_id(0) == 0:
        tl.store(ends_E + experts, ends, mask=experts < num_experts)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # The experts that end before this tile.
    before = (last_tile[None, :] <= tile[:, None]) & (experts < num_experts)[None, :]
    expert = tl.sum(before.to(tl.int32), 1)
    first_row = tl.sum(tl.where(before, counts[None, :], 0), 1)
    first_tile = tl.sum(tl.where(before, tiles_of[None, :], 0), 1)
    own = tl.sum(tl.where(experts[None, :] == expert[:, None], counts[None, :], 0), 1)
    end = tl.where(expert < num_experts, first_row + own, num_rows)
    first = tl.minimum(first_row + (tile - first_tile) * ROWS, num_rows)
    there = tile < num_tiles
    tl.store(tiles_3B + tile, expert, mask=there)
    tl.store(tiles_3B + num_tiles + tile, first, mask=there)
    tl.store(tiles_3B + 2 * num_tiles + tile, tl.minimum(first + ROWS, end), mask=there)


@jit
def place(num_tiles, num_columns, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(tile of rows, tile of columns) of this program: GROUP tiles of rows side by side go through all columns.

    They are mostly of one expert, whose weights are then read from L2.
    """
    across = tl.cdiv(num_columns, COLUMNS)
    number = tl.program_id(0)
    group = number // (GROUP * across)
    first = group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    inside = number % (GROUP * across)
    return first + inside % size, inside // size


@jit
def whole(size, UNIT: tl.constexpr):
    """A size or a stride as it is, known to be a multiple of UNIT. Of itself Triton looks for multiples of 16 alone."""
    return size // UNIT * UNIT


@jit
def read(at, rows_in, columns_in, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """What stands at `at`, 0 past a row or column that is masked."""
    if MASK_ROWS and MASK_COLUMNS:
        found = tl.load(at, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
    elif MASK_ROWS:
        found = tl.load(at, mask=rows_in[:, None], other=0.0)
    elif MASK_COLUMNS:
        found = tl.load(at, mask=columns_in[None, :], other=0.0)
    else:
        found = tl.load(at)
    return found


@jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a @ b, in float32. WIDEN: the interpreter multiplies bfloat16 as the integers that it keeps them as."""
    if WIDEN:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@jit
def rows_of(tiles_3B, num_tiles, tile, r):
    """The first row of a tile, and whether the rows r after it are the tile's."""
    first = tl.load(tiles_3B + num_tiles + tile)
    return first, r < tl.load(tiles_3B + 2 * num_tiles + tile) - first


@jit
def slots_of(order_R, row, row_in):
    """The slot of each row; without order_R it is the row."""
    if order_R is None:
        slot = row.to(tl.int64)
    else:
        slot = tl.load(order_R + row, mask=row_in, other=0).to(tl.int64)
    return slot


@jit
def tokens_of(slot, top_k):
    """The token of each slot. There are fewer than 2^31 slots, and a division of 64 bits is many instructions."""
    return (slot.to(tl.int32) // top_k).to(tl.int64)
