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


def kernels(*options: str) -> list[dict]:
    # Without TRITON_INTERPRET, which is read when triton is imported: a process of its own.
    command = [sys.executable, "-m", "tools.kernels", "--json", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


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


@pytest.mark.parametrize(
    "options",
    [("--dtype", "float32", "--size", "7", "37", "21", "8", "2"), ("--arch", "80", "--bias", "--dtype", "float16",
     "--size", "64", "96", "80", "8", "2")],
    ids=["exact float32 at odd widths", "gpt-oss in float16 on an A100"],
)  # fmt: skip
def test_every_kernel_compiles_at_other_sizes_and_dtypes(options):
    assert len(kernels(*options)) >= 11
