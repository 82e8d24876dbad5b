"""conformance, running: `moe-conformance diff`. Two routers, or two files of routing records, against each other.

    moe-conformance diff transformers torch --family deepseek_v3
    moe-conformance diff rollout.npy trainer.safetensors

Nobody is right here, and no near tie is forgiven: what counts is how often a rollout and a trainer disagree.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.rounding import close
from conformance.core.usage import UsageError
from conformance.router.case import RouterCase, held
from conformance.router.draw import bias_of_kind, inputs_of
from conformance.router.observation import Observation, observe
from conformance.run.record_files import OURS, SUFFIXES, Sizes, aligned, is_file, read_two
from conformance.run.subjects_by_name import subject_named
from moe_ref import RouterSpec, RoutingAgreement, RoutingRecord, agreement
from moe_ref.specs.families import FAMILIES
from moe_ref.specs.families import family as family_named
from moe_ref.specs.served import PADDINGS

HEAD = ("", "other sets", "other weights", "weight moved", "first stage", "replayed")


def add_options(command: ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of `diff`."""
    command.add_argument(
        "one", metavar="A", help=f"a subject with route(), or a file of routing records: {', '.join(SUFFIXES)}"
    )
    command.add_argument("other", metavar="B", help="the same kind of thing")
    command.add_argument("--family", metavar="NAME", help="compare the tiny router of this family, not of every one")
    command.add_argument("--spec", type=Path, metavar="FILE", help="compare this RouterSpec, as JSON")
    command.add_argument("--tokens", type=positive, default=256, metavar="N", help="of each router (default 256)")
    command.add_argument("--tolerance", type=float, default=1e-3, metavar="X", help="of a weight (default 0.001)")
    command.add_argument("--layers", type=positive, metavar="L", help="of an engine's record in base64, dense ones too")
    command.add_argument("--top-k", type=positive, metavar="K", help="of an engine's record in base64")
    command.add_argument(
        "--num-experts", type=positive, metavar="E", help="of an engine's record, an id being below it"
    )
    command.add_argument("--dense", type=int, nargs="+", default=[], metavar="LAYER", help="layers without a router")
    command.add_argument(
        "--padding",
        choices=PADDINGS,
        default="-1",
        help="arange: rows of 0 .. K-1 in all layers are no route (NeMo-RL)",
    )


def diff(options: Namespace) -> int:
    """Print how far two things agree: 0 where they do in everything, 1 where they differ."""
    files = [is_file(each) for each in (options.one, options.other)]
    if any(files) and not all(files):
        raise UsageError(f"{options.one} and {options.other} are not of one kind: two subjects, or two files")
    rows = list(_of_records(options) if all(files) else _of_subjects(options))
    if not rows:
        raise UsageError(f"{options.one} and {options.other} have nothing in common")
    table = [HEAD, *(row for row, _ in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0 if all(same for _, same in rows) else 1


Row = tuple[tuple[str, ...], bool]


def _row(name: str, found: RoutingAgreement, stage: str, replayed: str) -> Row:
    sets, weights, moved = found.set_mismatch_rate, found.weight_mismatch_rate, found.mean_moved_weight
    shown = ["-" if each is None else f"{each:.2%}" for each in (sets, weights, moved)]
    return (name, *shown, stage, replayed), not found.sets_differ_T.any() and not weights


def _of_records(options: Namespace) -> Iterator[Row]:
    """A row for each layer that both files have."""
    sizes = Sizes(
        num_layers=options.layers,
        top_k=options.top_k,
        num_experts=options.num_experts,
        dense=tuple(options.dense),
        padding=options.padding,
    )
    one, other = read_two(options.one, options.other, sizes)
    engines = not all(each.endswith(OURS) for each in (options.one, options.other))
    left_out = 0
    for name in one:
        if name in other:
            pair, missing = (one[name], other[name]), 0
            try:
                if engines:
                    *pair, missing = aligned(*pair)
                found = agreement(*pair, tolerance=options.tolerance)
            except ValueError as error:
                raise UsageError(f"layer {name}: {error}") from None
            left_out += missing
            stage = "select" if found.sets_differ_T.any() else "weights" if found.weight_mismatch_rate else ""
            yield _row(name, found, stage, "-")
    if left_out:
        print(f"not compared: {left_out} rows that one of the files has no route for, over all layers")


def _of_subjects(options: Namespace) -> Iterator[Row]:
    """A row for each router that both run."""
    judges = [Judge(subject_named(name)) for name in (options.one, options.other)]
    for name, spec in _specs(options):
        case = _case(spec, options.tokens)
        try:
            one, other = (observe(judge, case) for judge in judges)
        except NotRun:
            continue
        except Violation as error:
            raise UsageError(f"{name}: {error}: {error.received}") from None
        found = agreement(_record(one), _record(other), tolerance=options.tolerance)
        yield _row(name, found, _first_stage(one, other, found), _replayed(judges, one, options.tolerance))


def _specs(options: Namespace) -> Iterator[tuple[str, RouterSpec]]:
    try:
        if options.spec is not None:
            yield options.spec.stem, RouterSpec.from_dict(json.loads(options.spec.read_text()))
        elif options.family is not None:
            yield options.family, family_named(options.family).tiny
        else:
            seen = set()
            for family in FAMILIES.values():
                if family.tiny not in seen:
                    seen.add(family.tiny)
                    yield family.name, family.tiny
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def _case(spec: RouterSpec, tokens: int) -> RouterCase:
    rng = np.random.default_rng(0)
    has_bias = any(family.tiny == spec and family.expert_bias for family in FAMILIES.values())
    bias_E = bias_of_kind("mixed", spec, rng) if has_bias else None
    logits_TE = held(rng.normal(0, 2, (tokens, spec.num_logits)), "float32")
    bias_E = None if bias_E is None else held(bias_E, "float32")
    return RouterCase(spec=spec, logits_TE=logits_TE, expert_bias_E=bias_E, inputs=inputs_of(spec, tokens, (), rng))


def _record(seen: Observation) -> RoutingRecord:
    return RoutingRecord.of_choice(seen.expert_ids_TK, seen.weights_TK, seen.case.spec)


def _first_stage(one: Observation, other: Observation, found: RoutingAgreement) -> str:
    """The earliest stage in which the two differ, of those that both show."""
    scores, groups = (one.scores_TE, other.scores_TE), (one.group_ids_TL, other.group_ids_TL)
    if scores[0] is not None and scores[1] is not None and not close(*scores, 1e-4, 1e-30).all():
        return "score"
    if groups[0] is not None and groups[1] is not None and (np.sort(groups[0]) != np.sort(groups[1])).any():
        return "groups"
    return "select" if found.sets_differ_T.any() else "weights" if found.weight_mismatch_rate else ""


def _replayed(judges: list[Judge], one: Observation, tolerance: float) -> str:
    """How many tokens have other weights where both are given the choice of the first one."""
    case = one.case
    try:
        given = case.with_(
            spec=case.spec.given(),
            expert_bias_E=None,
            inputs={name: value for name, value in case.inputs.items() if name == "learned_scale"}
            | {"given_ids_TK": one.expert_ids_TK},
        )
        first, second = (_record(observe(judge, given)) for judge in judges)
    except (NotRun, ValueError):
        return "-"
    return f"{agreement(first, second, tolerance=tolerance).weight_mismatch_rate:.2%}"
