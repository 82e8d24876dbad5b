"""moe_torch, tests of the kernels as a GPU gets them: they are compiled for an H100, on which this does not run.

The compiler takes what the interpreter takes only in part: types, layouts, registers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_STACK = 128
"""Bytes that a thread may spill: next to none; a kernel that had 1,728 was the slowest of its pass."""
ROOM_OF_AN_RTX_4090 = 101376
"""Bytes of shared memory that a program may have there."""


def run(*arguments: str) -> str:
    """The last line that a Python says, one without TRITON_INTERPRET, which is read when triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return said.splitlines()[-1]


def kernels(*options: str) -> list[dict]:
    return json.loads(run("-m", "tools.kernels", "--json", *options))


def test_every_kernel_compiles_for_an_h100_in_bfloat16_spills_nothing_and_keeps_its_tensor_cores_fed():
    found = kernels()
    assert {each["kernel"] for each in found} == {
        "route_kernel", "route_backward_kernel", "count_kernel", "place_kernel", "table_kernel",
        "up_kernel", "down_kernel", "sum_kernel", "hidden_kernel", "tokens_kernel", "weights_kernel",
    }  # fmt: skip
    for each in found:
        assert each["stack"] <= MOST_STACK, each
        if each["kernel"] in ("up_kernel", "down_kernel", "hidden_kernel", "tokens_kernel", "weights_kernel"):
            assert each["wgmma"] > 0, each
            assert each["cp.async"] > 0, each
            # Of gathered rows the numbers are loaded first, and the rows with what stages are left.
            assert each["loads ahead"] >= 2, each
            assert each["division of 64 bits"] == 0, each


def test_rows_of_whole_16_bytes_are_loaded_ahead_whatever_their_number_on_a_small_gpu_too():
    """360 numbers are no multiple of 16, as which Triton knows sizes by itself; an RTX 4090 has room for two stages."""
    for each in kernels("--arch", "89", "--size", "4096", "2880", "360", "32", "4"):
        assert each["shared"] <= ROOM_OF_AN_RTX_4090, each
        if each["kernel"] in ("up_kernel", "down_kernel", "hidden_kernel", "tokens_kernel", "weights_kernel"):
            assert each["loads ahead"] >= 2, each
            assert each["stack"] <= MOST_STACK, each


def test_a_number_that_changes_with_the_tokens_is_no_part_of_what_is_compiled():
    text = """
from moe_torch.kernels import backward, forward, router, sort, tiles

kernels = [v for m in (backward, forward, router, sort, tiles) for n, v in vars(m).items() if n.endswith("_kernel")]
of_tokens = ("num_tokens", "num_rows", "num_tiles", "num_slots", "num_blocks")
print(len(kernels), [(k.__name__, p.name) for k in kernels for p in k.params if p.name in of_tokens
                     and not p.do_not_specialize])
"""
    assert run("-c", text) == "11 []"


@pytest.mark.parametrize(
    "options",
    [("--dtype", "float32", "--size", "7", "37", "21", "8", "2"), ("--arch", "80", "--bias", "--dtype", "float16",
     "--size", "64", "96", "80", "8", "2")],
    ids=["exact float32 at odd widths", "gpt-oss in float16 on an A100"],
)  # fmt: skip
def test_every_kernel_compiles_at_other_sizes_and_dtypes(options):
    assert len(kernels(*options)) >= 11
