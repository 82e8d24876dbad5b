"""benchmarks, the part of the GPU's that judges: both subjects at the same time, each by processes of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_parts import keep


def judge(dry: bool, seconds: int) -> dict:
    """Of both subjects, judged at the same time: how many requirements have each status, and those that do not hold."""
    with tempfile.TemporaryDirectory() as folder:
        going = {name: judging(name, dry, seconds, Path(folder) / name) for name in ("torch", "jax")}
        found = {}
        for name, process in going.items():
            process.wait()
            found[name] = verdicts(Path(folder) / name)
            keep(found)
        return found


def judging(subject: str, dry: bool, seconds: int, folder: Path) -> subprocess.Popen:
    """A process that judges it, and leaves in the folder what it finds and prints."""
    command = [sys.executable, "-m", "conformance.run.cli", "run", subject, "--timeout", str(seconds)]
    here = "cpu" if subject == "jax" else "interpreter"
    command += ["--device", here, "--stage", "gate", "--examples", "1"] if dry else ["--device", "cuda"]
    folder.mkdir()
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen([*command, "--report", str(folder)], stdout=output, stderr=subprocess.STDOUT)


def verdicts(folder: Path) -> dict:
    """What `judging` has left."""
    printed = (folder / "output.txt").read_text().strip() or "it printed nothing"
    if not (folder / "report.json").exists():
        return {"left out": printed.splitlines()[-1][:300]}
    found = json.loads((folder / "report.json").read_text())
    rows = found["requirements"]
    wrong = [r for r in rows if r["status"] in ("NEW", "STALE")]
    return {
        "subject": found["subjects"],
        "complete": found["complete"],
        "broke off": printed.partition(": the run broke off, ")[2][:300],
        "counts": {status: sum(r["status"] == status for r in rows) for status in sorted({r["status"] for r in rows})},
        "wrong": {r["id"]: r.get("failure", {}).get("page", "")[:2000] for r in wrong},
    }
