"""conformance, running: `moe-conformance precision`. What a coarse stage does to a routing, or how exact a subject is.

moe-conformance precision deepseek_v3
moe-conformance precision torch
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from conformance.core.usage import UsageError
from conformance.precision.page import BOUND, PUBLIC, of_family, subject_lines
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.run.subjects_by_name import subject_named
from moe_ref.specs.checks import nearest


def add_options(command: ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of `precision`."""
    command.add_argument("name", metavar="NAME", help="a family, or a subject as of run")
    command.add_argument("--tokens", type=positive, default=2048, metavar="N", help="that are routed (default 2048)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of tokens and gate (default 0)")
    command.add_argument(
        "--bound",
        type=float,
        default=BOUND,
        metavar="X",
        help=f"of other experts and of weights, which the contract of a family keeps (default {BOUND:g})",
    )


def precision(options: Namespace) -> int:
    """Print the table; always 0."""
    how = {"tokens": options.tokens, "seed": options.seed}
    if options.name in PUBLIC:
        print(of_family(PUBLIC[options.name], bound=options.bound, **how))
        return 0
    try:
        subject = subject_named(options.name)
    except UsageError as error:
        raise UsageError(f"{error}; of families there is no {options.name!r}{nearest(options.name, PUBLIC)}") from None
    print("\n".join(subject_lines(subject, **how)))
    return 0
