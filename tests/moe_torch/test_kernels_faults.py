"""moe_torch, tests of the tests of the kernels: planted faults, each of which a case of `test_kernels` catches.

A fault of the table of tiles is planted behind the kernel that makes it, one of a mask in the text of the kernels.
"""

import importlib.util
from types import ModuleType

import pytest
import torch
from kernel_cases import case, is_caught, run

from moe_torch.kernels import backward, forward, launch, tiles

CASES = [
    {"T": 20, "E": 3, "K": 2, "unused": 0.3, "empty": None, "form": "gpt_oss"},
    {"T": 11, "E": 4, "K": 2, "empty": 1},
]


def caught() -> bool:
    """Whether one of the cases sees the fault that is planted now."""
    return any(is_caught(case(**sizes)) for sizes in CASES)


class After:
    """A kernel that is followed by a change to the arrays it was given; launched as a kernel is."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.kernel[grid](*arguments, **named)
            self.change(*arguments)

        return run


def tail_of_the_last_expert(counts_E, tiles_3B, ends_E, num_rows, num_experts, *_):
    """Rows of nobody count as rows of the last expert."""
    tiles_3B[0].clamp_(max=num_experts - 1)
    ends_E[-1] = num_rows


def one_row_short(counts_E, tiles_3B, *_):
    """Each tile leaves its last row out."""
    tiles_3B[2] = torch.maximum(tiles_3B[2] - 1, tiles_3B[1])


def ends_of_the_next_expert(counts_E, tiles_3B, ends_E, *_):
    """The weights' gradients take the rows of the expert after."""
    ends_E[:-1] = ends_E[1:].clone()


def tiles_of_the_next_expert(counts_E, tiles_3B, ends_E, num_rows, num_experts, *_):
    """A tile works with the weights of the expert after."""
    own = tiles_3B[0] < num_experts
    tiles_3B[0] = torch.where(own, (tiles_3B[0] + 1) % num_experts, tiles_3B[0])


def in_reverse(counts_E, tiles_3B, *_):
    """The last tile comes first, which changes nothing."""
    tiles_3B.copy_(tiles_3B.flip(1))


def spill_into_the_next_tile(counts_E, tiles_3B, ends_E, num_rows, *_):
    """A tile is full, with rows of the next one where its expert ends before."""
    tiles_3B[2] = (tiles_3B[1] + 16).clamp(max=num_rows)
    # On a GPU two tiles race for these rows. The interpreter runs them in order: here the wrong one comes last.
    in_reverse(counts_E, tiles_3B)


@pytest.mark.parametrize(
    "change",
    [tail_of_the_last_expert, one_row_short, ends_of_the_next_expert, tiles_of_the_next_expert,
     spill_into_the_next_tile],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_fault_of_the_table_of_tiles_is_caught(change, monkeypatch):
    monkeypatch.setattr(launch, "table_kernel", After(launch.table_kernel, change))
    assert caught()


def test_a_table_that_is_one_tile_short_is_caught(monkeypatch):
    # The last tile is needed where every expert, and nobody, ends in the middle of one: 5 rows on 4 and nobody.
    sizes = {"T": 5, "E": 4, "K": 1, "unused": 0.0, "empty": None, "seed": 3}
    ids = torch.tensor([[0], [1], [2], [3], [-1]])
    whole = case(**sizes)
    whole.expert_ids_TK.copy_(ids)
    whole.x_TD[4] = whole.d_out_TD[4] = torch.nan
    assert not is_caught(whole)
    monkeypatch.setattr(launch, "most_tiles", lambda *sizes: num_tiles(*sizes) - 1)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(launch.Pass, "new", lambda p, *shape: p.x_TD.new_full(shape, torch.nan))
    assert is_caught(whole)


num_tiles = launch.most_tiles


def poisoned(empty):
    """New arrays of floats hold NaN: what a kernel does not write shows."""

    def made(*shape, **how):
        found = empty(*shape, **how)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    return made


# None of them leaves an array: the interpreter would read and write whatever memory stands there.
PLANTED = {
    ("forward", "a mask of depth that is one short"): ("d_in = d < D - k", "d_in = d < D - k - 1"),
    ("forward", "a mask of depth that is one short in the down product"): ("f_in = f < F - k", "f_in = f < F - k - 1"),
    ("backward", "a mask of depth that is one short in the gradient of tokens"): (
        "f_in = f < F - k", "f_in = f < F - k - 1",
    ),
    ("backward", "an up half that starts one step late"): ("k - steps * DEPTH, k)", "k - (steps - 1) * DEPTH, k)"),
    ("tiles", "a row of a tile left out"): ("r < tl.load(tiles_3B + 2 *", "r + 1 < tl.load(tiles_3B + 2 *"),
    ("forward", "a last column that is not stored"): ("(d < D)[None, :]", "(d < D - 1)[None, :]"),
    ("forward", "a slot left out of the sum"): ("for k in range(0, top_k):", "for k in range(1, top_k):"),
    ("forward", "a row of nobody that is not written"): (
        "mask=row_in[:, None] & (d < D)[None, :])", "mask=row_in[:, None] & (d < D)[None, :] & (expert < num_experts))",
    ),
    ("backward", "a row of the next expert in a weight's gradient"): ("row_in = row < end", "row_in = row < end + 1"),
    ("backward", "a last row left out of a weight's gradient"): ("row_in = row < end", "row_in = row < end - 1"),
    ("backward", "a bias that counts in each tile of columns"): ("if column != 0:", "if column < 0:"),
    ("backward", "a slope without the clamp"): (
        "d_up = clamped_up_slope(weighted * hidden, up, CLAMP, LINEAR_BETA)", "d_up = weighted * hidden",
    ),
    ("backward", "a router's gradient of the hidden values times their weight"): (
        "d_weight = tl.sum(d_hidden * hidden, 1)", "d_weight = tl.sum(weighted * hidden, 1)",
    ),
    ("backward", "the first expert starting at the end of the last"): (
        "mask=expert > 0, other=0)", "mask=expert > 0, other=1)",
    ),
}  # fmt: skip


def planted(module: ModuleType, old: str, new: str, tmp_path) -> ModuleType:
    """The module with a line changed, from a file: the interpreter reads the text of a kernel."""
    assert module.__file__ is not None
    with open(module.__file__) as file:
        text = file.read()
    assert old in text
    path = tmp_path / "planted_kernels.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed


@pytest.mark.parametrize(("place", "texts"), PLANTED.items(), ids=[name for _, name in PLANTED])
def test_a_fault_in_the_text_of_a_kernel_is_caught(place, texts, tmp_path, monkeypatch):
    changed = planted({"forward": forward, "backward": backward, "tiles": tiles}[place[0]], *texts, tmp_path)
    if place[0] == "tiles":
        for user in (forward, backward):
            monkeypatch.setattr(user, "rows_of", changed.rows_of)
    for name in vars(changed):
        if name.endswith("_kernel"):
            monkeypatch.setattr(launch, name, getattr(changed, name))
    # What is not written shows as NaN, and not as what the memory happened to hold.
    monkeypatch.setattr(launch.Pass, "new", lambda p, *shape: p.x_TD.new_full(shape, torch.nan))
    assert caught()


def test_no_fault_is_no_accusation():
    assert not caught()


def test_the_order_of_tiles_changes_no_bit(monkeypatch):
    found = run(case(**CASES[0]))
    monkeypatch.setattr(launch, "table_kernel", After(launch.table_kernel, in_reverse))
    again = run(case(**CASES[0]))
    assert all(torch.equal(found[name], again[name]) for name in found)
