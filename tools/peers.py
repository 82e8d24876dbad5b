"""tools, peers: code bases that cannot share our environment, each in one of its own below .peers. `make peers`.

python -m tools.peers                                # every peer that is not there yet
.peers/maxtext/bin/moe-conformance run maxtext       # then judged from its own environment
.peers/megatron/bin/moe-conformance run megatron
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tools.matrix import interpreter_of

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".peers"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What an environment holds besides this project."""

    name: str
    pythons: tuple[str, ...]
    """Versions of Python that it runs with, the preferred one first."""
    requirements: Path
    """A file for pip."""


PEERS = (
    Peer(name="maxtext", pythons=("3.12", "3.13"), requirements=ROOT / "benchmarks" / "maxtext-requirements.txt"),
    Peer(name="megatron", pythons=("3.12", "3.13"), requirements=ROOT / "benchmarks" / "megatron-requirements.txt"),
)  # fmt: skip


def main() -> None:
    """Builds what is missing.

    Raises:
        SystemExit: with a sentence, where there is no such Python, or pip fails.
    """
    for peer in PEERS:
        folder = ENVIRONMENTS / peer.name
        if not (folder / "installed").exists():
            build(peer, folder)
        print(f"{peer.name}: {folder.relative_to(ROOT)}/bin/moe-conformance run {peer.name}")


def build(peer: Peer, folder: Path) -> None:
    """An environment with the peer and, in place, this project."""
    found = next((command for version in peer.pythons if (command := interpreter_of(version))), None)
    if found is None:
        raise SystemExit(f"{peer.name} needs Python {' or '.join(peer.pythons)}, and there is none here")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*found, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*install, "-r", peer.requirements, "-e", ROOT])
    if done.returncode:
        raise SystemExit(f"pip could not install {peer.name}: what it says stands above")
    (folder / "installed").touch()


if __name__ == "__main__":
    main()
