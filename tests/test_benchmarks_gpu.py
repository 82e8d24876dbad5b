"""benchmarks, tests of the GPU's: without a device a sentence, and every part at tiny sizes in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def gpu(*options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so():
    done = gpu()
    assert done.returncode == 1
    assert "PyTorch finds no CUDA device" in done.stdout


def test_every_part_runs_at_tiny_sizes_and_leaves_its_results(tmp_path):
    parts = ("device", "judge", "layer 0", "jax", "router", "promises")
    done = gpu("--dry", "--out", str(tmp_path / "gpu.json"), "--only", *parts)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert tuple(found) == parts
    for subject in ("torch", "jax"):
        assert found["judge"][subject]["wrong"] == {}
        assert found["judge"][subject]["counts"]["ok"]
    assert found["jax"]["largest difference from blocked"]["tail 3, result in float32"] == [0, 0, 0]
    assert found["jax"]["layer"]["forward"]["ms"] > 0
    assert found["layer 0"]["error"] < 2.0**-5
    assert max(found["layer 0"]["gradients beside grouped_mm"].values()) < 2.0**-5
    assert all(
        isinstance(row["ms"], float) for way in ("forward", "training") for row in found["layer 0"][way].values()
    )
    assert found["router"]["T7"]["differing tokens"] == 0
    assert found["promises"]["equal bits"] is True
    assert found["promises"]["compiled"] is True
