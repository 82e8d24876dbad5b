"""tests of diff: two routers, or two files of records, against each other."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.run.cli import main
from moe_ref import RouterSpec, capture, records_from_served, route, save_records, served_base64

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


def engine_files(tmp_path, tokens: int = 20) -> tuple[np.ndarray, dict[str, str]]:
    """What a rollout recorded in three layers, the first of them dense, as its engine writes it, and as we do."""
    rng = np.random.default_rng(0)
    ids_TLK = np.stack([route(rng.normal(size=(tokens, 8)), SPEC).expert_ids_TK for _ in range(3)], axis=1)
    ids_TLK[:, 0] = 0
    files = {name: str(tmp_path / f"rollout.{name}") for name in ("npy", "json", "safetensors")}
    np.save(files["npy"], ids_TLK[:-1])
    response = {"text": "", "meta_info": {"routed_experts": served_base64(ids_TLK[:-1])}}
    Path(files["json"]).write_text(json.dumps(response))
    return ids_TLK, files


SIZES = ("--layers", "3", "--top-k", "2", "--dense", "0")


def test_what_engines_hand_over_is_compared_by_layer(tmp_path, capsys):
    _, files = engine_files(tmp_path)
    assert main(["diff", files["npy"], files["json"], *SIZES]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:4] for row in rows] == [["1", "0.00%", "-", "-"], ["2", "0.00%", "-", "-"]]


def test_an_engine_is_compared_with_a_trainer_but_for_the_token_that_it_did_not_run(tmp_path, capsys):
    pytest.importorskip("safetensors")
    ids_TLK, files = engine_files(tmp_path)
    ids_TLK[4, 1] = [7, 6] if 7 not in ids_TLK[4, 1] else [5, 4]
    save_records(files["safetensors"], records_from_served(ids_TLK, [None, SPEC, SPEC]))
    assert main(["diff", files["npy"], files["safetensors"]]) == 1
    note, _, first, second = capsys.readouterr().out.splitlines()
    assert note.startswith("not compared: 2 rows")
    assert first.split()[:2] == ["1", f"{1 / 19:.2%}"]
    assert second.split()[:2] == ["2", "0.00%"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "3", "--top-k", "2"), "a repeated 0 is a record that was lost"),
        (("--dense", "0"), "num_layers and top_k are needed"),
        (("--layers", "3", "--top-k", "2", "--dense", "0", "5"), "--dense 5: there are 3 layers"),
        ((*SIZES, "--num-experts", "4"), "ids are below 4"),
    ],
)
def test_a_record_that_is_none_is_a_usage_error(tmp_path, capsys, options, message):
    _, files = engine_files(tmp_path)
    assert main(["diff", files["npy"], files["json"], *options]) == 4
    assert message in capsys.readouterr().err


def test_a_file_is_not_compared_with_a_subject(capsys):
    assert main(["diff", "reference", "x.safetensors"]) == 4
    assert "are not of one kind" in capsys.readouterr().err
    assert main(["diff", "reference", "reference", "--family", "mixtrall"]) == 4
    assert "mixtral" in capsys.readouterr().err
