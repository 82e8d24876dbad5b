"""The house: which room imports which, how long a file may be, and that generated text is up to date."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("moe_ref", "moe_jax", "moe_torch", "conformance")
FRAMEWORKS = {"jax", "torch", "transformers", "torchtitan", "flax", "tokamax"}
REFERENCE_TYPES = {
    "moe_ref",
    "moe_ref.spec",
    "moe_ref.layout",
    "moe_ref.weights",
    "moe_ref.checks",
    "moe_ref.load_spec",
    "moe_ref.record",
}
"""What the implementations may import of the reference: data types and checks, never an algorithm."""
REFERENCE_NAMES = {
    "RouterSpec",
    "ExpertSpec",
    "SharedSpec",
    "LayerSpec",
    "BalanceSpec",
    "BiasUpdateSpec",
    "CapacitySpec",
    "RoutingRecord",
    "load_records",
    "save_records",
    "ShardLayout",
    "LayerParams",
    "WeightLayout",
    "UNUSED",
}


def modules(room: str):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path):
    """(module, names) of each import statement of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, tuple(alias.name for alias in node.names)


def top(module: str) -> str:
    return module.partition(".")[0]


def test_the_reference_imports_numpy_alone():
    allowed = {"numpy", "moe_ref"} | sys.stdlib_module_names
    for path in modules("moe_ref"):
        assert {top(module) for module, _ in imports(path)} <= allowed, path


@pytest.mark.parametrize(("room", "framework"), [("moe_jax", "jax"), ("moe_torch", "torch")])
def test_an_implementation_imports_its_framework_and_the_types_of_the_reference(room, framework):
    for path in modules(room):
        for module, names in imports(path):
            assert top(module) not in FRAMEWORKS - {framework, "tokamax"}, path
            assert top(module) not in set(ROOMS) - {room, "moe_ref"}, path
            if top(module) == "moe_ref":
                assert module in REFERENCE_TYPES, f"{path} imports {module}"
                assert module == "moe_ref.checks" or set(names) <= REFERENCE_NAMES, f"{path} imports {names}"


def test_the_judge_imports_frameworks_in_subjects_alone():
    for path in modules("conformance"):
        if path.parent.name == "subjects":
            continue
        for module, _ in imports(path):
            assert top(module) not in FRAMEWORKS, f"{path} imports {module}"
            assert top(module) not in {"moe_jax", "moe_torch"}, f"{path} imports {module}"


def test_reference_and_judge_import_without_any_framework():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(FRAMEWORKS | {"ml_dtypes"}))
    code = f"import sys; {blocked}; import moe_ref, conformance.run.cli, conformance.core.trial as t; t.load_suite()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_file_is_longer_than_400_lines():
    for room in (*ROOMS, "tests", "benchmarks"):
        for path in modules(room):
            assert len(path.read_text().splitlines()) <= 400, path


def test_the_first_line_of_a_file_says_its_room():
    for room in ROOMS:
        for path in modules(room):
            assert path.read_text().startswith(f'"""{room}'), path


def test_the_specification_page_is_up_to_date():
    from conformance.core.register import spec_markdown

    assert (ROOT / "SPEC.md").read_text() == spec_markdown(), "run `make docs`"


def test_the_generated_parts_of_the_readme_are_up_to_date():
    from tools.docs import with_parts

    readme = (ROOT / "README.md").read_text()
    assert with_parts(readme) == readme, "run `make docs`"
