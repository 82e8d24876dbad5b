"""benchmarks, the GPU: judges the subjects on it, then times layer and router beside what people use.

    python -m benchmarks.gpu            # everything, in under 8 minutes; benchmarks/results/gpu-DEVICE.json
    python -m benchmarks.gpu --dry      # the same at tiny sizes without a GPU, kernels interpreted: times mean nothing

It needs no network, and nothing installed but what the subjects need: numpy, pytest, hypothesis, torch >= 2.11 and
triton >= 3.6, found on PYTHONPATH. Each part is a process of its own, so that a kernel that breaks its device ends one
part alone; what is done is in the file at once, and a part that cannot run, or is cut, says why there.

Candidates of a table are timed in one process. The dense bound is one feed-forward network over T * K rows: the same
products with one expert's weights. "grouped_mm" is the manner of torchtitan: sort, gather, three F.grouped_mm,
scatter-add.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_jax import jax_part
from benchmarks.gpu_judge import judge
from benchmarks.gpu_parts import SIZES, TINY, LeftOut, device, layer, promises, router, tiles
from benchmarks.harness import RESULTS, write_json

BUDGET = 470
"""Seconds for everything."""
LAST_WORDS = 30
"""Of those of the judge: for ending what is judged too long, and for the report of what was found."""
GRACE = 15
"""Seconds for what a part has started to end what it has started itself."""


PARTS = {
    # name -> seconds it may take, of the 8 minutes; the most important first
    "device": 40,
    "judge": 220,
    "layer 0": 80,
    "jax": 100,
    "router": 60,
    "layer 1": 60,
    "layer 2": 80,
    "promises": 60,
    "tiles": 120,
}


def run_part(name: str, dry: bool) -> dict:
    """A part, in this process."""
    if name == "judge":
        return judge(dry, PARTS[name] - LAST_WORDS)
    if name.startswith("layer"):
        return layer(TINY if dry else SIZES[int(name.split()[1])], dry)
    parts = {"device": device, "jax": jax_part, "router": router, "promises": promises, "tiles": tiles}
    return parts[name](dry)


def in_a_process(command: list[str], seconds: float) -> dict:
    """A part in a process of its own: what it found, and why that is not all."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / each for each in ("output", "errors")]
        with (
            files[0].open("w") as output,
            files[1].open("w") as errors,
            started(command, stdout=output, stderr=errors) as process,
        ):
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
        printed, said = (file.read_text(errors="replace").strip().splitlines() for file in files)
    found = next(filter(None, map(kept, reversed(printed))), {})
    if code is None:
        found["left out"] = f"it did not end within {seconds:.0f} s"
    elif code or not found:
        found["left out"] = f"exit status {code}: {(said or printed or ['nothing was printed'])[-1][:300]}"
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def kept(line: str) -> dict | None:
    """What a part has kept on a line; None: it is another one's line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def started(command: list[str], **files) -> Iterator[subprocess.Popen]:
    """A process; with it ends what it has started, which would take the device from what is timed next."""
    process = subprocess.Popen(command, start_new_session=True, **files)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                # The judge's processes are sessions of their own; it ends them.
                os.killpg(process.pid, signal.SIGTERM)
                until = time.monotonic() + GRACE
                while time.monotonic() < until:
                    process.poll()
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def no_device() -> str:
    """Why there is nothing to time on; empty: there is."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-DEVICE.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument("--part", choices=PARTS, help="one part, as JSON on the last line")
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not args.part and (why := no_device()):  # once; and a part of JAX has no PyTorch beside it
        print(f"benchmarks.gpu: there is no device to run on: {why}. --dry tries all parts without one.")
        return 1
    if args.part:
        print(json.dumps(alone(args.part, args.dry)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with the part that runs
    begin, found = time.monotonic(), {}
    for name, seconds in PARTS.items():
        if args.only and name not in args.only:
            continue
        left = BUDGET - (time.monotonic() - begin)
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *(["--dry"] if args.dry else [])]
        found[name] = in_a_process(command, min(seconds, left)) if left > 15 else {"left out": "no time left"}
        print(f"{name}: {json.dumps(found[name])[:400]}", flush=True)
        slug = re.sub(r"[^a-z0-9]+", "-", str(found.get("device", {}).get("name", "unknown")).lower()).strip("-")
        write_json(args.out or RESULTS / f"gpu-{slug}.json", found)
    return 0


def alone(name: str, dry: bool) -> dict:
    """A part with the kernels it is about."""
    try:
        if not dry:
            return run_part(name, dry)
        import numpy as np

        from moe_torch.kernels import interpreted

        with interpreted(), np.errstate(all="ignore"):
            return run_part(name, dry)
    except LeftOut as sentence:
        return {"left out": str(sentence)}


if __name__ == "__main__":
    sys.exit(main())
