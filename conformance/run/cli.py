"""conformance, the command line of `moe-conformance`; `main` is its entry.

Exit status: 0 nothing new; 1 a new failure or a stale declaration; 4 a usage error.
"""

import argparse
import os
import re
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from conformance.core.kind import kind_of
from conformance.core.register import REQUIREMENTS, SPEC_VERSION, STAGES, spec_markdown
from conformance.core.usage import UsageError
from conformance.pictures import balance as balance_picture
from conformance.pictures import traffic
from conformance.run.compare import compare
from conformance.run.deviations import case_id, read_case
from conformance.run.diff import add_options as add_diff_options
from conformance.run.diff import diff
from conformance.run.identify import add_options as add_identify_options
from conformance.run.identify import identify
from conformance.run.kinds import load_faults
from conformance.run.precision import add_options as add_precision_options
from conformance.run.precision import precision
from conformance.run.subjects_by_name import subject_named
from conformance.run.vectors import add_options as add_vectors_options
from conformance.run.vectors import vectors
from conformance.run.views import add_options as add_view_options
from conformance.run.views import views
from moe_ref.specs.checks import nearest

EXIT_USAGE = 4
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE, what a shell says of a program that it ended."""


class Parser(argparse.ArgumentParser):
    """argparse with our exit status, and the nearest valid name where one was mistyped."""

    def error(self, message):
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += nearest(match[1], re.findall(r"[\w-]+", match[2]))
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"moe-conformance: {message}\n")


def parser() -> Parser:
    """Every command and option; docs/commands.md is made from it."""
    top = Parser(prog="moe-conformance", description="Judges Mixture-of-Experts implementations against moe_ref.")
    shown = f"moe-conformance {_version()}, specification {SPEC_VERSION}"
    top.add_argument("--version", action="version", version=shown)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    run = commands.add_parser("run", help="judge subjects; without one, every built-in subject that is importable")
    _add_run_options(run)

    listing = commands.add_parser("list", help="the requirements, a line each")
    listing.add_argument("--stage", choices=STAGES, metavar="STAGE", help="of this stage alone")

    replay = commands.add_parser("replay", help="one case again, stage by stage beside the reference")
    replay.add_argument("case", metavar="ID", help="such as SEL-3-b254db, or the path of a case file")
    replay.add_argument("--subject", metavar="SUBJECT", help="default: the one that failed")
    replay.add_argument("--device", metavar="DEVICE", help="as of run")

    changes = commands.add_parser("compare", help="two report.json: which requirements changed their status")
    changes.add_argument("before", type=Path, metavar="BEFORE", help="report.json, or the folder of --report")
    changes.add_argument("after", type=Path, metavar="AFTER", help="the same, later")

    seen = commands.add_parser("report", help="views of a stored report: HTML with pictures, summary, JUnit, badge")
    seen.add_argument("file", type=Path, metavar="REPORT", help="report.json, or the folder of --report")
    add_view_options(seen)

    faults = commands.add_parser("faults", help="the known wrong routers and layers, and what catches each")
    faults.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="how many seeds (default 1: the cases of a run)"
    )
    faults.add_argument("--only", metavar="NAME", help="one fault")
    faults.add_argument("--all", action="store_true", help="every requirement that catches it, not the first")
    faults.add_argument(
        "--diagnose", action="store_true", help="in place of that: does the first page of a run name it (minutes)"
    )

    two = commands.add_parser("diff", help="two routers, or two files of routing records, against each other")
    add_diff_options(two, _positive)

    named = commands.add_parser("identify", help="which RouterSpec, and whose, an unknown router computes")
    add_identify_options(named, _positive)

    moved = commands.add_parser("traffic", help="rows and bytes across nodes, for each strategy of a layout")
    traffic.add_options(moved, _positive)

    evened = commands.add_parser("load", help="the load of experts over steps, without bias updates and with them")
    balance_picture.add_options(evened, _positive)

    exact = commands.add_parser("precision", help="what a coarse stage does to a routing (docs/precision.md)")
    add_precision_options(exact, _positive)

    stored = commands.add_parser(
        "vectors", help="stored calls with what they return, for any language (docs/vectors.md)"
    )
    add_vectors_options(stored)

    commands.add_parser("glossary", help="our names, and those of other code bases, as Markdown")
    commands.add_parser("options", help="this table")
    spec = commands.add_parser(
        "spec", help="SPEC.md; with --config the layer of a published config, as JSON for run --spec"
    )
    _add_spec_options(spec)
    public = commands.add_parser("families", help="how public models route, and what each row is verified against")
    public.add_argument("--markdown", action="store_true", help="as docs/families.md has it")
    new = commands.add_parser("new-subject", help="a file of 25 lines to start from, on standard output")
    new.add_argument("kind", choices=("numpy", "torch", "jax"), metavar="KIND", help="numpy, torch or jax")
    return top


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("subjects", nargs="*", metavar="SUBJECT", help="a name, module:Class or path/to/file.py:Class")
    run.add_argument(
        "--family",
        nargs="+",
        metavar=("NAME", "FIELD=VALUE"),
        help="judge exactly the router of a family at its published size, such as deepseek_v3 num_experts=384",
    )
    run.add_argument("--spec", type=Path, metavar="FILE", help="judge exactly this RouterSpec or LayerSpec, as JSON")
    run.add_argument("--tokens", type=_positive, metavar="N", help="of each case of --family or --spec")
    run.add_argument(
        "--width",
        nargs=2,
        type=_positive,
        metavar=("DIM", "HIDDEN_DIM"),
        help="of the layer of --family or --spec, in place of its full one",
    )
    run.add_argument(
        "--device",
        metavar="DEVICE",
        help="where the subject computes, such as cuda or cuda:1; torch has interpreter too, its kernels on a CPU, "
        "with TRITON_INTERPRET=1 in the environment",
    )
    run.add_argument("--examples", type=_positive, metavar="N", help="cases for each requirement")
    run.add_argument("--seed", type=int, metavar="S", help="other cases than the fixed ones")
    run.add_argument(
        "--stage",
        choices=STAGES,
        action="append",
        default=[],
        metavar="STAGE",
        help=f"of this stage alone; given several times, of these. One of {', '.join(STAGES)}",
    )
    run.add_argument("--deviations", action="append", default=[], metavar="FILE", help="TOML of known deviations")
    run.add_argument(
        "--report", type=Path, metavar="DIR", help="write report.json, report.md, report.html and junit.xml there"
    )
    add_view_options(run)
    run.add_argument(
        "--propose-deviations",
        type=Path,
        metavar="FILE",
        help="write what is new as deviations, reason and link left empty, with their witnesses",
    )
    run.add_argument("--advice", action="store_true", help="show the pages of SHOULDs that do not hold too")
    run.add_argument("--durations", action="store_true", help="what each stage costs, and the slowest requirements")
    run.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="that judge at once (default: 2, or 4 with --device, where there are so many cores)",
    )
    run.add_argument(
        "--timeout", type=_positive, default=1800, metavar="SECONDS", help="for each subject (default 1800)"
    )
    run.add_argument(
        "--limit",
        type=_positive,
        default=300,
        metavar="SECONDS",
        help="for each requirement (default 300); one that takes longer is accused, and the rest is judged",
    )


def _add_spec_options(spec: argparse.ArgumentParser) -> None:
    spec.add_argument("--config", type=Path, metavar="FILE", help="a config.json of huggingface, or a file of --from")
    spec.add_argument(
        "--from",
        dest="source",
        choices=("hf", "maxtext", "torchtitan", "megatron"),
        default="hf",
        metavar="CODE",
        help="whose config it is: hf (default), maxtext, torchtitan, megatron",
    )
    spec.add_argument("--layers", action="store_true", help="one for each decoder layer, null where it is dense")
    spec.add_argument("--router", action="store_true", help="its router alone, which more models have")
    spec.add_argument("--ignore", nargs="+", default=[], metavar="KEY", help="keys that do not concern the MoE layers")


def options_markdown() -> str:
    """Commands and options as a Markdown table, made from the parser, so that they cannot drift apart."""
    lines = ["| command | option | meaning |", "|---|---|---|"]
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for pseudo in commands._choices_actions:
        lines.append(f"| `{pseudo.dest}` | | {pseudo.help} |")
        for action in commands.choices[pseudo.dest]._actions:
            if not isinstance(action, argparse._HelpAction):
                name = " ".join([*action.option_strings[:1], *_metavar(action)])
                choices = ", ".join(map(str, action.choices or ()))
                meaning = action.help or (f"one of {choices}" if choices else "")
                lines.append(f"| | `{name or action.dest}` | {meaning} |")
    return "\n".join(lines)


def _metavar(action: argparse.Action) -> list[str]:
    names = action.metavar or ()
    return [names] if isinstance(names, str) else list(names)


def _version() -> str:
    try:
        return version("moe-conformance")
    except PackageNotFoundError:
        return "of a checkout"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = parser().parse_args(argv)
    try:
        status = COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `| head`; what Python would flush at its exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (UsageError, ImportError) as error:
        print(f"moe-conformance: {error}", file=sys.stderr)
        return EXIT_USAGE


def run(options) -> int:
    from conformance.run.running import run_subjects

    # A run that is terminated ends as one that is interrupted: with the processes that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_subjects(options)


def list_requirements(options) -> int:
    for r in REQUIREMENTS.values():
        if options.stage in (None, r.stage):
            print(f"{r.id:<7} {r.level:<6}  {r.stage:<8}  {r.sentence}")
    return 0


def replay(options) -> int:
    """Judge one stored case again: 0 where it holds, 1 where it does not."""
    import json

    from conformance.core.check import CHECKS
    from conformance.core.judge import Judge, NotRun, Violation
    from conformance.run.causes import diagnoses
    from conformance.run.conclude import CASES
    from conformance.run.report import failure_page

    path = Path(options.case) if options.case.endswith(".json") else _find_case(options.case, CASES)
    requirement, case = read_case(path)
    name = options.subject or json.loads(path.read_text()).get("subject", "")
    if not name:
        raise UsageError(f"case {path} names no subject; give --subject")
    judge, kind = Judge(subject_named(name, options.device)), kind_of(requirement)
    try:
        judge.run(CHECKS[requirement], case)
    except Violation as violation:
        print(failure_page(judge, violation, diagnoses(judge, violation)))
        print(kind.side_by_side(judge, case))
        return 1
    except NotRun as sentence:
        print(f"{case_id(requirement, case)}: {judge.name} does not run it: {sentence}")
        return 0
    print(kind.side_by_side(judge, case))
    print(f"{case_id(requirement, case)}: {judge.name} holds {requirement}  {REQUIREMENTS[requirement].sentence}")
    return 0


def _find_case(name: str, local: Path) -> Path:
    """A case by id: of the last runs in this folder, or a witness of a shipped deviation."""
    witnesses = Path(__file__).parents[1] / "deviations_of" / "witnesses"
    found = {path.stem: path for folder in (witnesses, local) for path in sorted(folder.glob("*.json"))}
    if name not in found:
        hint = nearest(name, found) if found else ""
        raise UsageError(f"there is no case {name!r} in {local}{hint}")
    return found[name]


def faults(options) -> int:
    """The kill table: 0 where every fault is caught with every seed, by as many cases as a run has.

    What catches a fault first, its own requirement tried first; with --all every requirement of its kind that does.
    """
    from conformance.core.fault import first_killer, killers

    known = load_faults()
    name = options.only and options.only.replace("_", "-")  # or that of its function
    chosen = [fault for fault in known.values() if name in (None, fault.name)]
    if not chosen:
        raise UsageError(f"there is no fault {name!r}{nearest(str(name), known)}")
    if options.diagnose:
        from conformance.run import causes

        for line in causes.table(chosen):
            print(line, flush=True)
        return 0
    survivors = 0
    for seed in (None, *range(1, options.seeds)):
        if seed is not None:
            print(f"seed {seed}")
        for fault in chosen:
            if options.all:
                found = list(killers(fault, seed=seed))
            else:
                first = first_killer(fault, seed=seed)
                found = [first.requirement] if first else []
                if first and first.requirement != fault.requirement:
                    found.append(f"(not {fault.requirement}, which it breaks)")
            survivors += not found
            print(f"{fault.name:<50} {fault.stage:<8} {' '.join(found) or 'SURVIVES'}", flush=True)
    print(f"{len(chosen)} faults, {options.seeds} seeds, {survivors} survivors")
    return 1 if survivors else 0


def glossary(options) -> int:
    from moe_ref.specs.names import glossary_markdown

    print(glossary_markdown())
    return 0


def options_table(options) -> int:
    print(options_markdown())
    return 0


def spec(options) -> int:
    if options.config is None:
        if options.layers or options.router or options.ignore or options.source != "hf":
            raise UsageError("--from, --layers, --router and --ignore are about the file of --config")
        print(spec_markdown(), end="")
        return 0
    from conformance.run.read_config import text_of

    print(text_of(options.config, options.source, layers=options.layers, router=options.router,
                  ignore=tuple(options.ignore)))  # fmt: skip
    return 0


def families(options) -> int:
    from shutil import get_terminal_size

    from conformance.run.families import markdown, text

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = get_terminal_size().columns if narrow else sys.maxsize  # whole lines for grep
    print(markdown() if options.markdown else text(width))
    return 0


def new_subject(options) -> int:
    print((Path(__file__).parents[1] / "templates" / f"{options.kind}_subject.py.txt").read_text(), end="")
    return 0


COMMANDS = {
    "run": run,
    "list": list_requirements,
    "replay": replay,
    "compare": compare,
    "report": views,
    "faults": faults,
    "diff": diff,
    "identify": identify,
    "traffic": traffic.traffic,
    "load": balance_picture.load,
    "precision": precision,
    "vectors": vectors,
    "glossary": glossary,
    "options": options_table,
    "spec": spec,
    "families": families,
    "new-subject": new_subject,
}

if __name__ == "__main__":
    sys.exit(main())
