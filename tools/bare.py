"""tools, bare: a wheel holds the four packages and their data, and nothing else. `make bare` asks it."""

import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("moe_ref/", "moe_jax/", "moe_torch/", "conformance/")
FRAMEWORKS = ("jax", "torch", "transformers", "torchtitan", "ml_dtypes")


def strangers(wheel: str) -> list[str]:
    """The files of a wheel that are no part of the packages of this checkout: tests, benchmarks, what was deleted."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    return [name for name in names if not (name.startswith(PACKAGES) and (ROOT / name).exists())]


def main(wheel: str) -> None:
    """Ends with a sentence where the wheel, or what is installed beside it, is not bare."""
    if found := strangers(wheel):
        sys.exit(f"the wheel holds {', '.join(found)}")
    if found := [name for name in FRAMEWORKS if find_spec(name)]:
        sys.exit(f"installed as well: {', '.join(found)}")
    import numpy

    import conformance

    print(f"{wheel}: bare, with NumPy {numpy.__version__}, from {conformance.__file__}")


if __name__ == "__main__":
    main(sys.argv[1])
