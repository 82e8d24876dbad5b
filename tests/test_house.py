"""The house: which room imports which, that nothing runs upwards or in a circle, and that generated text is current.

Each rule is a function of the arrows, (importer, imported), and is shown to fail on an arrow planted against it.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("moe_ref", "moe_jax", "moe_torch", "conformance")
FRAMEWORKS = {"jax", "torch", "transformers", "torchtitan", "flax", "tokamax", "triton", "maxtext", "megatron"}
FLOORS = {
    # Each may import what stands before it, in the room; what has one number may not import each other.
    "moe_ref": {"moe_ref.specs": 0, "moe_ref": 1, "moe_ref.strategies": 1, "moe_ref.backward": 2},
    "moe_jax": {"moe_jax": 0, "moe_jax.parallel": 1},
    "moe_torch": {"moe_torch.kernels": 0, "moe_torch": 1, "moe_torch.parallel": 2},
    "conformance": {
        "conformance.core": 0,
        "conformance.subjects": 1,
        "conformance.router": 2,
        "conformance.layer": 3,
        "conformance.sharded": 4,
        "conformance.balance": 4,
        "conformance.training": 4,
        "conformance.identify": 5,
        "conformance.precision": 5,
        "conformance.vectors": 5,
        "conformance.pictures": 5,
        "conformance.run": 6,
        "conformance.suite": 7,
    },
}
KINDS = ("router", "layer", "sharded", "balance", "training")
MOST_LINES = 500
ID = re.compile(r"\b(?:CFG|RUN|GAT|SCR|GRP|SEL|WGT|PRM|EXP|CMB|LAY|LAT|NUL|BWD|REP|RPL|DSP|LYT|LOD|CAP|MSK|STP)-\d+\b")

Arrows = frozenset[tuple[str, str]]


# the arrows


@cache
def modules() -> dict[str, Path]:
    """name -> file of every module of the rooms."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path):
    """(module, names) of each import statement of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, tuple(alias.name for alias in node.names)


@cache
def arrows() -> Arrows:
    """(importer, imported) of all files, in whatever function the import stands; other packages by their own name."""
    found = set()
    for importer, path in modules().items():
        for module, names in imports(path):
            parts = {f"{module}.{name}" for name in names if f"{module}.{name}" in modules()}
            found |= {(importer, imported) for imported in parts}
            # A name that is no module comes from the package itself.
            if not names or len(parts) < len(names):
                found.add((importer, module))
    return frozenset((a, b) for a, b in found if a != b)


def top(module: str) -> str:
    return module.partition(".")[0]


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def chapter_of(module: str) -> str | None:
    """conformance.router.select of any module in it; None for what is in no chapter."""
    parts = module.split(".")
    in_kind = len(parts) >= 3 and parts[0] == "conformance" and parts[1] in KINDS
    chapter = ".".join(parts[:3])
    is_folder = chapter in modules() and modules()[chapter].name == "__init__.py"
    return chapter if in_kind and is_folder else None


def is_fault(module: str) -> bool:
    return chapter_of(module) is not None and module.rpartition(".")[2].startswith("faults")


# the rules: each returns the arrows against it


def strangers(found: Arrows) -> set:
    """The reference imports NumPy alone; an implementation its framework and the data types of the reference; the judge
    a framework inside the folder of a subject alone."""
    wrong = set()
    for a, b in found:
        if top(a) == "moe_ref":
            good = top(b) in {"numpy", "moe_ref"} | sys.stdlib_module_names
        elif top(a) in ("moe_jax", "moe_torch"):
            other = set(ROOMS) - {top(a), "moe_ref"}
            framework = {"moe_jax": {"jax", "tokamax"}, "moe_torch": {"torch", "triton"}}[top(a)]
            good = top(b) not in (FRAMEWORKS - framework) | other
            good = good and (top(b) != "moe_ref" or inside(b, "moe_ref.specs"))
        else:
            subject = inside(a, "conformance.subjects")
            good = subject or top(b) not in FRAMEWORKS | {"moe_jax", "moe_torch"}
        wrong |= set() if good else {(a, b)}
    return wrong


def floor_of(module: str) -> int:
    """The floor of the longest folder that holds a module."""
    folders = [folder for folder in FLOORS[top(module)] if inside(module, folder)]
    return FLOORS[top(module)][max(folders, key=len)] if folders else -1


def upward(found: Arrows) -> set:
    """Folders import downwards only."""
    own = {(a, b) for a, b in found if top(a) in ROOMS and top(b) == top(a) and b != top(b)}
    faces = {(a, b) for a, b in own if modules().get(a, Path()).name == "__init__.py"}  # they show what is above
    return {
        (a, b)
        for a, b in own - faces
        if floor_of(b) > floor_of(a) or (floor_of(b) == floor_of(a) and folder(a) != folder(b))
        if {folder(a), folder(b)} != {"moe_ref", "moe_ref.strategies"}
    }


def folder(module: str) -> str:
    """The folder of `FLOORS` that a module is in."""
    return max((f for f in FLOORS[top(module)] if inside(module, f)), key=len, default=top(module))


def circles(found: Arrows) -> list[list[str]]:
    """Files that import each other, in however many steps."""
    to: dict[str, set[str]] = {}
    for a, b in found:
        if b in modules():
            to.setdefault(a, set()).add(b)
    number, low, stack, on_stack, wrong = {}, {}, [], set(), []

    def visit(a: str) -> None:  # Tarjan's strongly connected components
        number[a] = low[a] = len(number)
        stack.append(a)
        on_stack.add(a)
        for b in to.get(a, ()):
            if b not in number:
                visit(b)
                low[a] = min(low[a], low[b])
            elif b in on_stack:
                low[a] = min(low[a], number[b])
        if low[a] == number[a]:
            at = stack.index(a)
            component = stack[at:]
            del stack[at:]
            on_stack.difference_update(component)
            if len(component) > 1:
                wrong.append(sorted(component))

    for a in sorted(to):
        if a not in number:
            visit(a)
    return wrong


def between_chapters(found: Arrows) -> set:
    """A chapter imports no other chapter, and nothing that is no chapter imports one; but what runs the suite does, by
    name, when it is asked to."""
    return {(a, b) for a, b in found if chapter_of(b) is not None and chapter_of(a) != chapter_of(b)}


def of_faults(found: Arrows) -> set:
    """Nothing but a fault of the same chapter imports a fault."""
    return {(a, b) for a, b in found if is_fault(b) and not (is_fault(a) and chapter_of(a) == chapter_of(b))}


# the house keeps them


@pytest.mark.parametrize("rule", [strangers, upward, circles, between_chapters, of_faults], ids=lambda r: r.__name__)
def test_no_arrow_is_against_a_rule(rule):
    assert sorted(rule(arrows())) == []


@pytest.mark.parametrize(
    ("rule", "a", "b"),
    [
        (strangers, "moe_ref.routing", "jax"),
        (strangers, "moe_ref.specs.router", "conformance.core.case"),
        (strangers, "moe_jax.routing", "torch"),
        (strangers, "moe_jax.routing", "moe_ref.routing"),
        (strangers, "moe_jax.routing", "moe_ref"),
        (strangers, "moe_torch.routing", "moe_jax.routing"),
        (strangers, "conformance.core.judge", "torch"),
        (strangers, "conformance.router.verdicts", "moe_torch.routing"),
        (upward, "moe_ref.specs.router", "moe_ref.routing"),
        (upward, "moe_jax.routing", "moe_jax.parallel.layer"),
        (upward, "conformance.core.judge", "conformance.router.case"),
        (upward, "conformance.router.verdicts", "conformance.layer.verdicts"),
        (upward, "conformance.sharded.verdicts", "conformance.balance.verdicts"),
        (upward, "conformance.layer.verdicts", "conformance.run.report"),
        (between_chapters, "conformance.router.select.checks", "conformance.router.groups.checks"),
        (between_chapters, "conformance.router.kind", "conformance.router.select.checks"),
        (between_chapters, "conformance.core.trial", "conformance.router.select.requirements"),
        (of_faults, "conformance.router.select.checks", "conformance.router.select.faults"),
        (of_faults, "conformance.run.plugin", "conformance.router.select.faults"),
        (of_faults, "conformance.router.select.faults", "conformance.router.groups.faults"),
    ],
)
def test_a_planted_arrow_is_seen(rule, a, b):
    assert (a, b) not in arrows()
    assert (a, b) in rule(arrows() | {(a, b)})


def test_a_planted_circle_is_seen():
    assert circles(arrows() | {("moe_ref.routing", "moe_ref.layer")})
    assert circles(arrows() | {("conformance.core.case", "conformance.core.trial")})


def test_every_arrow_of_the_rules_is_between_modules_that_there_are():
    assert {b for _, b in arrows() if top(b) in ROOMS} <= modules().keys()


# what else a reader relies on


def test_reference_and_judge_import_without_any_framework():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(FRAMEWORKS | {"ml_dtypes"}))
    code = f"import sys; {blocked}; import moe_ref, conformance.run.cli, conformance.run.kinds as k; k.load_faults()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_run_without_a_failure_imports_no_fault():
    code = (
        "import sys, conformance.run.plugin, conformance.run.conclude, conformance.suite.test_requirements\n"
        "assert not [name for name in sys.modules if name.rpartition('.')[2].startswith('faults')], sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def unknown_ids(text: str) -> set[str]:
    """Ids of requirements in a text that the register does not have."""
    from conformance.core.register import REQUIREMENTS
    from conformance.run import kinds  # noqa: F401  (its chapters register)

    return set(ID.findall(text)) - REQUIREMENTS.keys()


def test_every_id_in_the_text_of_a_file_exists():
    found = {str(path): unknown_ids(path.read_text()) for path in modules().values()}
    assert {path: ids for path, ids in found.items() if ids} == {}


def test_an_id_that_does_not_exist_is_seen():
    assert unknown_ids("[SEL-14 .. SEL-999], WGT-15") == {"SEL-999"}


def test_a_file_has_one_idea_of_about_500_lines_at_most():
    for path in [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_the_first_line_of_a_file_says_its_room():
    for name, path in modules().items():
        assert path.read_text().startswith(f'"""{top(name)}'), path


def test_the_specification_page_is_up_to_date():
    from conformance.core.register import spec_markdown
    from conformance.run import kinds  # noqa: F401  (its chapters register)

    assert (ROOT / "SPEC.md").read_text() == spec_markdown(), "run `make docs`"


def test_the_generated_pages_are_up_to_date():
    from tools.docs import PAGES

    for name, make in PAGES.items():
        assert (ROOT / name).read_text() == make(), f"{name}: run `make docs`"
