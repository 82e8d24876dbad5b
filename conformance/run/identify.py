"""conformance, running: `moe-conformance identify`. Which RouterSpec and which families an unknown router is.

moe-conformance identify router.py:MyRouter --num-experts 64 --top-k 6
moe-conformance identify transformers --family deepseek_v3
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from conformance.core.capabilities import capabilities
from conformance.core.subject import Subject
from conformance.core.usage import UsageError
from conformance.identify import answer
from conformance.identify.box import Malformed
from conformance.identify.search import identify as search
from conformance.run.kinds import load_faults
from conformance.run.subjects_by_name import subject_named
from moe_ref import RouterSpec
from moe_ref.specs.families import FAMILIES
from moe_ref.specs.families import family as family_named

SIZES = ((8, 2), (16, 4), (64, 6), (128, 8), (256, 8))
"""(num_experts, top_k) that are tried where nothing is told."""


def add_options(command: ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of `identify`."""
    command.add_argument(
        "subject", metavar="SUBJECT", help="a name, module:Class or path/to/file.py:Class with route()"
    )
    command.add_argument("--num-experts", type=positive, metavar="E", help="columns of the logits that are experts")
    command.add_argument("--top-k", type=positive, metavar="K", help="experts for each token")
    command.add_argument(
        "--family", metavar="NAME", help="hand it the tiny router of this family, sizes alone being used"
    )
    command.add_argument("--spec", type=Path, metavar="FILE", help="hand it this RouterSpec, as JSON, likewise")


def identify(options: Namespace) -> int:
    """Print which spec a router has: 0 where one explains every answer, 1 where none does."""
    subject = subject_named(options.subject)
    if "route" not in capabilities(subject):
        raise UsageError(f"{options.subject} has no route()")
    found, refused = None, []
    for handed in _handed(options, subject):
        if (sentence := subject.supports(handed)) is not None:
            refused.append(sentence)
            continue
        try:
            found = search(subject, handed)
            if found.box.top_k != found.box.handed.top_k and _untold(options):
                # It may have a top_k of its own, which is then handed to it: what follows the spec differs again.
                found = search(subject, handed.replace(top_k=found.box.top_k))
        except Malformed as wrong:
            print(f"{options.subject}: what it returns is no routing: {wrong}")
            return 1
        except UsageError as error:
            refused.append(str(error))
            continue
        break
    if found is None:
        raise UsageError(f"{options.subject} takes no router that it is handed: {refused[0]}; see --family and --spec")
    print(answer.text(found, load_faults()))
    as_told = found.box.top_k == found.box.handed.top_k
    return 0 if found.fits and as_told else 1


def _untold(options: Namespace) -> bool:
    """Whether top_k is a guess of ours."""
    return options.top_k is None and options.family is None and options.spec is None


def _handed(options: Namespace, subject: Subject) -> Iterator[RouterSpec]:
    """What the subject may be handed, the first that it takes: the box tells its sizes alone."""
    try:
        if options.spec is not None:
            yield RouterSpec.from_dict(json.loads(options.spec.read_text()))
        elif options.family is not None:
            tiny = family_named(options.family).tiny
            if hasattr(subject, "family"):
                setattr(subject, "family", options.family)  # noqa: B010  (a subject of several real routers)
            sizes = {"num_experts": options.num_experts, "top_k": options.top_k}
            yield tiny.replace(**{name: value for name, value in sizes.items() if value is not None})
        else:
            E, K = options.num_experts, options.top_k
            told = {name: value for name, value in (("num_experts", E), ("top_k", K)) if value is not None}
            if told:
                own = max(8, K or 0) if E is None else E
                yield RouterSpec(num_experts=own, top_k=min(2, own) if K is None else K)
            else:
                yield from (RouterSpec(num_experts=E, top_k=K) for E, K in SIZES)
            for each in dict.fromkeys(family.tiny for family in FAMILIES.values()):
                with suppress(ValueError):  # of what is told, not of this family
                    yield each.replace(**told)
    except OSError as error:
        raise UsageError(f"spec {options.spec}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
