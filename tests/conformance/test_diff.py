"""tests of diff: two routers, or two files of records, against each other."""

import sys

import numpy as np
import pytest

from conformance.run.cli import main
from moe_ref import RouterSpec, capture, route, save_records

SPEC = RouterSpec(num_experts=8, top_k=2)
SOURCE = """
from conformance.subjects.reference import Reference


class Mine(Reference):
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        return super().route(logits_TE{}, spec, expert_bias_E, **inputs)
"""


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "router_that_is_compared.py"

    def write(change: str) -> str:
        path.write_text(SOURCE.format(change))
        return f"{path}:Mine"

    yield write
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_a_router_does_not_differ_from_itself(capsys):
    assert main(["diff", "reference", "reference", "--tokens", "16"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["other", "sets", "other", "weights", "weight", "moved", "first", "stage", "replayed"]
    assert len(rows) > 20
    assert all("0.00%" in row for row in rows[1:])


@pytest.mark.parametrize(("change", "stage"), [("[:, ::-1].copy()", "score"), (" * 0.5", "score")])
def test_the_first_stage_that_differs_is_named(written, capsys, change, stage):
    assert main(["diff", "reference", written(change), "--family", "mixtral", "--tokens", "32"]) == 1
    name, sets, weights, _, found, replayed = capsys.readouterr().out.splitlines()[1].split()
    assert (name, found) == ("mixtral", stage)
    assert (sets == "0.00%") == ("0.5" in change)
    assert weights == "100.00%"
    assert replayed == "100.00%"


def test_two_files_of_records_are_compared_by_layer(tmp_path, capsys):
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(50, 8))
    files = [str(tmp_path / f"{name}.safetensors") for name in ("rollout", "trainer")]
    for file, noise in zip(files, (0.0, 0.3), strict=True):
        noisy_TE = logits_TE + rng.normal(0, noise, (50, 8))
        layers = {"0": logits_TE, "1": noisy_TE}
        save_records(file, {name: capture(route(each_TE, SPEC), SPEC) for name, each_TE in layers.items()})
    assert main(["diff", *files]) == 1
    same, other = (row.split() for row in capsys.readouterr().out.splitlines()[1:])
    assert same[:4] == ["0", "0.00%", "0.00%", "0.00%"]
    assert other[0] == "1"
    assert other[4] == "select"


def test_a_file_is_not_compared_with_a_subject(capsys):
    assert main(["diff", "reference", "x.safetensors"]) == 4
    assert "are not of one kind" in capsys.readouterr().err
    assert main(["diff", "reference", "reference", "--family", "mixtrall"]) == 4
    assert "mixtral" in capsys.readouterr().err
