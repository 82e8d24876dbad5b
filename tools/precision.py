"""tools, precision: writes docs/precision.md. `python -m tools.precision` takes a few minutes, and every subject.

It is not one of the pages of `tools.docs`: its numbers depend on the libraries that are installed.
"""

import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from conformance.precision.audit import BIAS_SPREAD, DIM, SPREAD
from conformance.precision.page import families_table, subjects_table
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.run.subjects_by_name import subject_named

SUBJECTS = ("reference", "torch", "jax", "transformers", "torchtitan")
SEED, TOKENS, TOKENS_OF_SUBJECT = 0, 1024, 64


def markdown() -> str:
    """The page."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "jax", "transformers", "torchtitan"))
    subjects = [(name, partial(subject_named, name)) for name in SUBJECTS]
    text = (Path(__file__).parent / "precision.md.txt").read_text()
    return text.format(
        date=datetime.date.today(),
        seed=SEED,
        tokens=TOKENS,
        tokens_of_subject=TOKENS_OF_SUBJECT,
        dim=DIM,
        spread=SPREAD,
        bias_spread=BIAS_SPREAD,
        libraries=libraries,
        families=families_table(tokens=TOKENS, seed=SEED),
        subjects=subjects_table(subjects, tokens=TOKENS_OF_SUBJECT, seed=SEED),
    )


if __name__ == "__main__":
    Path("docs/precision.md").write_text(markdown())
