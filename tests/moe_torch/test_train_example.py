"""examples/train_torch.py, as its first lines say: over ranks, in one process, and resumed over other ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_torch.py"
STEPS, SAVED = 14, 10


def started(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen:
    torchrun = () if ranks == 1 else ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    # gloo listens on the address of the host's name, which need not be this machine's.
    loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    return subprocess.Popen(
        [sys.executable, *torchrun, str(EXAMPLE), f"--folder={folder}", f"--steps={STEPS}", *arguments],
        env=os.environ | loopback | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen, folder: Path) -> tuple[list[dict], str]:
    """What it wrote, and what it printed."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return json.loads((folder / "history.json").read_text()), printed


def test_four_ranks_and_a_restart_on_two_have_the_losses_of_one_process(tmp_path):
    alone, over_four = tmp_path / "alone", tmp_path / "over_four"
    processes = started(alone), started(over_four, "--expert=2", "--fsdp=2", ranks=4)
    (wanted, _), (found, printed) = finished(processes[0], alone), finished(processes[1], over_four)
    assert f"{STEPS}/{STEPS}" in printed
    assert "Warning" not in printed
    assert (over_four / "history.png").stat().st_size > 0
    assert wanted[-1]["loss"] < wanted[0]["loss"] - 0.5
    resumed, _ = finished(started(over_four, "--expert=2", "--resume", ranks=2), over_four)
    assert [now["step"] for now in resumed] == list(range(SAVED, STEPS))
    for now in (*found, *resumed):
        assert now == pytest.approx(wanted[now["step"]], rel=1e-4)
