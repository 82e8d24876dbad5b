"""conformance, vectors: a set is written, read by strangers, and says which requirement a wrong answer violates."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.fault import FAULTS
from conformance.core.register import REQUIREMENTS
from conformance.router.pairs import FIELDS
from conformance.run.cli import main
from conformance.run.kinds import load_faults
from conformance.subjects.reference import Reference
from conformance.vectors.calls import by_name, made
from conformance.vectors.choose import Trial, calls_of, fresh
from conformance.vectors.container import laid_out, packed, safetensors_bytes
from conformance.vectors.expected import Unclear, on_grid
from conformance.vectors.files import Read, read
from conformance.vectors.judged import differences, verdict
from moe_ref.specs.layout import STRATEGY_FACTS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "vectors"
MOST_BYTES = 20e6
OTHER_MACHINE = {
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 X86_V3 AVX512F AVX512_SKX AVX512_ICL AVX512_SPR AVX2 FMA3",
    "OPENBLAS_CORETYPE": "Nehalem",
}
"""Other code for exp and matrix products, where the CPU has what is left out here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A set on disk."""
    folder = tmp_path_factory.mktemp("vectors")
    assert main(["vectors", "write", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def cases(folder) -> list[Read]:
    return read(folder)


def answer(subject, cases: list[Read], folder: Path) -> Path:
    """What a subject returns for these cases, as files."""
    judge, recorder = fresh()
    for case in cases:
        trial = Trial(**case.entry["trials"][0])
        calls = calls_of(judge, recorder, trial.check, trial.case(judge))
        tensors: dict[str, np.ndarray] = {}
        call = calls[case.entry["key"]]
        try:
            with np.errstate(all="ignore"):  # of poisoned rows
                packed(by_name(call.method, made(subject, call.method, call.arguments)), "", tensors)
        except ValueError:  # refused, as it is to be
            continue
        path = folder / f"{case.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors_bytes(*laid_out(tensors)))
    return folder


def test_a_set_covers_stages_fields_strategies_and_is_small(folder, cases):
    assert len(cases) >= 500
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST_BYTES
    without = REQUIREMENTS.keys() - {name for case in cases for name in case.entry["requirements"]}
    # What home() and quantile_update() return is a sum of gradients, and has an edge of bins: no radius is known there.
    unstored = {name for name in without if CHECKS[name].method in ("home", "quantile_update")}
    assert len(without - unstored) <= 10, without
    routers, layouts = [], []
    for case in cases:
        arguments = case.definition["arguments"]
        spec = arguments.get("spec", {})
        routers.append(spec.get("router", spec))
        layouts.append(arguments.get("layout", {}))
    # No other library draws the same numbers; and those of float16 often lie in the middle between two of the grid.
    rare = ("random", "float16")
    for field, values in FIELDS.items():
        for value in values[1:]:
            if value not in rare:
                assert any(router.get(field) == value for router in routers), (field, value)
    assert {each.get("strategy", "all_to_all") for each in layouts if each} == STRATEGY_FACTS.keys()
    largest = max(router.get("num_experts", 0) for router in routers)
    assert largest >= 256


def test_a_set_is_as_written_and_a_changed_byte_is_seen(folder, cases, capsys):
    assert main(["vectors", "check", str(folder)]) == 0
    path = folder / f"{cases[0].name}.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert main(["vectors", "check", str(folder)]) == 1
    assert f"{cases[0].name}.bin: its SHA-256 is" in capsys.readouterr().out
    path.write_bytes(content)


def test_the_bytes_are_those_of_another_machine(folder):
    """With other code for exp and matrix products, every eighth case is the same."""
    code = (
        "import sys; from pathlib import Path; from conformance.run import kinds\n"
        "from conformance.vectors.files import read; from conformance.vectors.judged import other_bytes\n"
        "found = list(other_bytes(read(Path(sys.argv[1]))[::8])); sys.exit('; '.join(found) or 0)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | OTHER_MACHINE)


def test_the_library_of_the_format_reads_the_same(cases):
    library = pytest.importorskip("safetensors.numpy", reason="comes with the frameworks; a bare install has no use")
    for case in cases[::40]:
        found = library.load_file(case.folder / f"{case.name}.safetensors")
        assert found.keys() == case.tensors.keys()
        for name, value in case.tensors.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def test_the_reference_in_float32_meets_every_third_case(cases, tmp_path):
    some = cases[::3]
    found = verdict(some, answer(Reference(), some, tmp_path))
    assert found.answered >= 0.97 * len(some)
    assert [each for each in found.differences if each.level == "MUST"] == []
    assert not found.is_wrong


@pytest.mark.parametrize(
    ("fault", "requirement"),
    [
        ("dropped-groups-filled-with-0", "SEL-3"),
        ("weights-of-biased-scores", "WGT-1"),
        ("weights-ignored", "CMB-2"),
        ("the-capacity-is-rounded-down", "CAP-3"),
    ],
)
def test_a_wrong_answer_violates_the_requirement_of_its_fault(cases, tmp_path, fault, requirement):
    load_faults()
    known = FAULTS[fault]
    asked = [case for case in cases if case.entry["method"] == known.method]
    found = verdict(asked, answer(known.kind.faulty(known), asked, tmp_path))
    assert found.is_wrong
    assert requirement in found.accused
    assert REQUIREMENTS[next(iter(found.accused))].stage in known.stages


def test_answers_are_read_from_a_folder_and_named(folder, cases, tmp_path, capsys):
    for case in (case for case in cases if case.entry["method"] == "load"):
        tensors = {"tokens_per_expert_E": case.outputs["tokens_per_expert_E"] + 1}
        path = tmp_path / f"{case.name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(safetensors_bytes(*laid_out(tensors)))
    assert main(["vectors", "check", str(folder), "--answers", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"of {len(cases)} cases are answered" in printed
    assert f"{case.name}: tokens_per_expert_E[0] is" in printed
    assert "\nLOD-2 MUST " in printed
    path.write_bytes(safetensors_bytes(*laid_out({"counts": np.zeros(1)})))
    assert main(["vectors", "check", str(folder), "--answers", str(tmp_path)]) == 1
    assert "there is no output 'counts'; there are tokens_per_expert_E" in capsys.readouterr().out


def test_slots_are_compared_by_expert_and_numbers_within_their_tolerance(cases):
    case = next(c for c in cases if c.entry["method"] == "route" and c.outputs["weights_TK"].shape[1:] > (2,)
                and "out.weights_TK.tolerance" in c.tensors and (c.outputs["expert_ids_TK"] >= 0).all())  # fmt: skip
    ids_TK, weights_TK = case.outputs["expert_ids_TK"], case.outputs["weights_TK"].astype(np.float64)
    turned = {"expert_ids_TK": ids_TK[:, ::-1], "weights_TK": weights_TK[:, ::-1]}
    assert not list(differences(case, turned))
    within = turned | {"weights_TK": (weights_TK + case.tolerance("weights_TK"))[:, ::-1]}
    assert not list(differences(case, within))
    beyond = turned | {"weights_TK": (weights_TK + 1.01 * case.tolerance("weights_TK"))[:, ::-1]}
    assert [each.output for each in differences(case, beyond)] == ["weights_TK"]


def test_values_lie_on_a_grid_far_below_their_tolerance_and_none_in_the_middle():
    value, radius = np.array([0.1, -3.7e5, 0.0]), np.array([1e-7, 0.25, 1e-30])
    rounded, tolerance = on_grid(value, radius)
    noisy, again = on_grid(value * (1 + 2.0**-50), radius * (1 - 2.0**-50))
    np.testing.assert_array_equal((rounded, tolerance), (noisy, again))
    assert (np.abs(rounded - value) <= radius / 8).all()
    assert ((radius < tolerance) & (tolerance <= 1.3 * radius)).all()
    with pytest.raises(Unclear, match="in the middle"):
        on_grid(np.array([1 + 2.0**-21]), np.array([2.0**-17]))


# readers that know nothing of us


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # as where it is run as a program
    spec = importlib.util.spec_from_file_location("vectors_reader", EXAMPLES / "reader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reader_in_plain_python_judges_its_router(folder, capsys, monkeypatch, reader):
    assert reader.main(folder) == 0
    clean = reader.route
    monkeypatch.setattr(reader, "route", lambda logits, spec: clean(logits, spec | {"route_norm": False}))
    assert reader.main(folder) == 1
    assert "one of: WGT-2 " in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_the_reader_in_cpp_judges_its_router(folder, tmp_path):
    def run(name: str, *flags: str) -> subprocess.CompletedProcess:
        build = ["g++", "-std=c++17", *flags, "-o", str(tmp_path / name), str(EXAMPLES / "reader.cpp")]
        subprocess.run(build, check=True)
        return subprocess.run([tmp_path / name, folder], capture_output=True, text=True)

    right = run("right", "-Wall", "-Werror")
    assert right.returncode == 0, right.stdout
    assert int(right.stdout.split()[0]) > 20
    wrong = run("wrong", "-DFILL=0")
    assert wrong.returncode == 1
    assert "SEL-3" in wrong.stdout
