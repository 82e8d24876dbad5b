"""benchmarks, the harness: paired timing, medians, and JSON that says on which machine they were taken.

Candidates take turns (A B C A B C ...), so that whatever else the machine does hits all of them alike. What is compared
is the ratio within a round; its median is what a report may claim.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One candidate's times over all rounds."""

    name: str
    median_ms: float
    fastest_ms: float
    speedup: dict[str, float]
    """For each baseline the median, over the rounds, of its time / own time."""
    rounds: int


def use_cores(count: int) -> None:
    """This process runs on `count` cores; call it before a framework starts its threads."""
    if hasattr(os, "sched_setaffinity"):  # Linux alone; XLA's CPU client sizes its pool by it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


@contextmanager
def busy_core(is_busy: bool = True) -> Iterator[None]:
    """Within it another process spins on the first of this process' cores."""
    if not is_busy:
        yield
        return
    core = min(os.sched_getaffinity(0))
    spin = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"])
    try:
        yield
    finally:
        spin.kill()
        spin.wait()


def paired(
    candidates: dict[str, Callable[[], object]], *, baselines: tuple[str, ...], rounds: int, warmup: int = 2
) -> list[Timing]:
    """Times of each candidate, called in turn. A candidate blocks until its result is there.

    Raises:
        ValueError: a baseline is no candidate, or there are no rounds.
    """
    for baseline in baselines:
        if baseline not in candidates:
            raise ValueError(f"baseline {baseline!r} is not one of {sorted(candidates)}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it is at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup):
        for call in candidates.values():
            call()
    gc.collect()
    gc.disable()  # a collection would hit one candidate of a round
    try:
        for _ in range(rounds):
            for name, call in candidates.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return [
        Timing(
            name=name,
            median_ms=1e3 * statistics.median(own),
            fastest_ms=1e3 * min(own),
            speedup={
                baseline: statistics.median(b / t for b, t in zip(seconds[baseline], own, strict=True))
                for baseline in baselines
            },
            rounds=rounds,
        )
        for name, own in seconds.items()
    ]


def machine(packages: Iterable[str]) -> dict:
    """Processor, cores in use, Python, and the versions of the packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(timings: list[Timing]) -> str:
    """The timings as a Markdown table, a column for each baseline."""
    titles = ["", "median ms", "fastest ms", *(f"times as fast as {name}" for name in timings[0].speedup)]
    rows = [
        [t.name, f"{t.median_ms:.1f}", f"{t.fastest_ms:.1f}", *(f"{s:.2f}" for s in t.speedup.values())]
        for t in timings
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def write_json(path: Path, results: dict) -> None:
    """Results as JSON; a Timing is a dict of its fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=asdict) + "\n")
