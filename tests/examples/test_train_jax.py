"""The example of JAX: over devices, and over two processes, it has the losses of one device; PyTorch's stand beside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_jax.py"
STEPS, SAVE_AT = 6, 3
# Sums in another order, in float32, over a few steps of training.
CLOSE = 2e-4
# Of so few steps nearly all time is the compiler's.
QUICK = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}


def trained(folder: Path, *options: str, example: Path = EXAMPLE) -> list[dict]:
    """The history of a run."""
    command = [sys.executable, str(example), "--steps", f"{STEPS}", "--save-at", f"{SAVE_AT}", "--folder", str(folder)]
    subprocess.run([*command, *options], check=True, timeout=300, cwd=EXAMPLE.parents[1], env=QUICK)
    return json.loads((folder / "history.json").read_text())


def test_a_run_that_is_stopped_and_goes_on_elsewhere_has_the_losses_of_one_device(tmp_path):
    in_torch = trained(tmp_path / "torch", example=EXAMPLE.with_name("train_torch.py"))
    alone = trained(tmp_path / "alone", "--beside", str(tmp_path / "torch"))
    # The same model on the same sequences, from parameters of other numbers.
    losses = ([now["loss"] for now in run] for run in (alone, in_torch))
    np.testing.assert_allclose(*losses, rtol=0.1)
    assert (tmp_path / "alone" / "history.png").stat().st_size > 1000
    begun = trained(tmp_path / "over", "--expert", "4", "--fsdp", "2")
    resumed = trained(tmp_path / "over", "--expert", "2", "--fsdp", "2", "--processes", "2", "--resume")
    assert [now["step"] for now in resumed] == list(range(SAVE_AT, STEPS))
    assert alone[-1]["loss"] < 0.95 * alone[0]["loss"]
    for found in (begun, resumed):
        for now in found:
            for name in ("loss", "norm"):
                np.testing.assert_allclose(now[name], alone[now["step"]][name], rtol=CLOSE, err_msg=f"{now}")
            assert now["load"] == alone[now["step"]]["load"]
    assert (tmp_path / "over" / "history.png").stat().st_size > 1000


def test_a_run_to_draw_beside_that_is_none_is_an_error(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--beside", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLE.parents[1])
    assert ended.returncode == 2
    assert "a run that ended there has left a history.json" in ended.stderr


def test_a_process_that_fails_ends_the_run_and_is_named(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--expert", "2", "--processes", "2", "--resume", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLE.parents[1])
    assert ended.returncode == 1
    assert "of 2 ended with exit code 1" in ended.stderr
    assert "FileNotFoundError" in ended.stderr
