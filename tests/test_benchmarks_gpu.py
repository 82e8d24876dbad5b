"""benchmarks, tests of the GPU's: without a device a sentence, and every part at tiny sizes in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import in_a_process

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


PART = """
import json, signal, subprocess, sys, time

if sys.argv[1:]:
    own = subprocess.Popen(["sleep", "600"], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(own.kill()))
    print(json.dumps({"pid": own.pid}), flush=True)
else:
    subprocess.Popen([sys.executable, __file__, "again"])
time.sleep(600)
"""
"""Starts a process as the judge is one, which has processes of sessions of their own and ends them where it is told."""


def test_of_a_part_that_is_cut_there_is_what_it_found_and_nothing_runs(tmp_path):
    (tmp_path / "part.py").write_text(PART)
    found = in_a_process([sys.executable, str(tmp_path / "part.py")], 3)
    assert found["left out"] == "it did not end within 3 s"
    status = Path(f"/proc/{found['pid']}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_of_a_part_that_dies_there_is_what_it_found_and_why():
    found = in_a_process([sys.executable, "-c", "print('{\"ms\": 1}'); print('{1}'); raise ValueError('no room')"], 60)
    assert found.pop("seconds") < 60
    assert found == {"ms": 1, "left out": "exit status 1: ValueError: no room"}
    assert in_a_process([sys.executable, "-c", ""], 60)["left out"] == "exit status 0: nothing was printed"


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
