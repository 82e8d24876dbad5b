"""conformance, pictures: figures of matplotlib, which is needed for a plot alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from conformance.core.usage import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class() -> "type[Figure]":
    """matplotlib's Figure.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise UsageError("--plot draws with matplotlib, which is not installed: pip install matplotlib") from missing
    return Figure


def save(figure: "Figure", file: Path, *, dpi: int = 100) -> None:
    """Write a figure with so many dots per inch.

    Raises:
        UsageError: the file cannot be written, or its ending is that of no picture.
    """
    try:
        figure.savefig(file, dpi=dpi)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {file}: {error}") from error
