"""Tests: `moe-conformance spec --config` and `moe-conformance families`."""

import json
import re

import pytest

from conformance.run.cli import main
from conformance.run.families import COLUMNS, rows
from moe_ref import LayerSpec, RouterSpec
from moe_ref.specs.families import CHECKPOINTS, FAMILIES

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_local_experts": 8,
    "num_hidden_layers": 2,
}
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "mlp_only_layers": [0], "num_experts": 16, "hidden_size": 8}


def file(tmp_path, config: dict) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_a_config_is_printed_as_a_spec_that_is_read_back(tmp_path, capsys):
    assert main(["spec", "--config", file(tmp_path, MIXTRAL)]) == 0
    assert LayerSpec.from_dict(json.loads(capsys.readouterr().out)) == LayerSpec.from_hf(MIXTRAL)


def test_layers_and_routers_are_printed_where_they_are_asked_for(tmp_path, capsys):
    path = file(tmp_path, QWEN)
    assert main(["spec", "--config", path, "--layers"]) == 0
    dense, sparse = json.loads(capsys.readouterr().out)
    assert dense is None
    assert LayerSpec.from_dict(sparse).router.num_experts == 16
    assert main(["spec", "--config", path, "--router"]) == 0
    assert RouterSpec.from_dict(json.loads(capsys.readouterr().out)).num_experts == 16


def test_another_code_base_is_named(tmp_path, capsys):
    config = {"decoder_block": "mixtral", "emb_dim": 16, "moe_mlp_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
    path = tmp_path / "x.yml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in config.items()))
    assert main(["spec", "--from", "maxtext", "--config", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["router"]["score_over"] == "selected"
    assert main(["spec", "--from", "maxtext", "--layers", "--config", str(path)]) == 4


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MIXTRAL | {"num_experts_per_tok": 9}, [], "num_experts_per_tok is 9"),
        (MIXTRAL | {"strange": 1}, [], "ignore=['strange']"),
        ({"model_type": "llama"}, [], "a dense model"),
        (MIXTRAL, ["--from", "hg"], "did you mean hf"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error_in_the_users_words(tmp_path, capsys, config, options, message):
    try:
        status = main(["spec", "--config", file(tmp_path, config), *options])
    except SystemExit as end:
        status = end.code
    assert status == 4
    assert message in capsys.readouterr().err


def test_a_key_is_passed_over_where_it_is_named(tmp_path, capsys):
    assert main(["spec", "--config", file(tmp_path, MIXTRAL | {"strange": 1}), "--ignore", "strange"]) == 0
    assert main(["spec", "--layers"]) == 4
    assert "--config" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_family_and_checkpoint(capsys):
    assert main(["families", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert [row[0].strip("`") for row in rows()] == [*FAMILIES, *CHECKPOINTS]
    assert all(len(row) == len(COLUMNS) for row in rows())
    assert "| `deepseek_v2` | 160 | 6 | softmax | 3 of 8 by 1 best, fill 0 |" in printed
    assert "- `kimi_k3`: a test elsewhere has a scale of 2.827" in printed
    by_name = {row[0].strip("`"): dict(zip(COLUMNS, row, strict=True)) for row in rows()}
    assert by_name["llama4"]["weight on"] == "input"
    assert by_name["gemma4"]["verified against"] == "router of transformers 5.24"
    assert by_name["gpt_oss"]["expert"] == "gated, clamped before, bias"
    assert by_name["kimi_k3"]["verified against"] == "not: see below"
    assert by_name["zaya"]["verified against"] == "router of transformers 5.24, which deviates: see below"


def test_the_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("kimi_k3 ") for line in lines) >= 2
    assert any(re.match(r"deepseek_v3 +0 +\de-07 +\de-07 +0 +\de-07 +\de-03$", line) for line in lines)
    monkeypatch.delenv("COLUMNS")  # and nobody is there who has a width
    assert main(["families"]) == 0
    assert capsys.readouterr().out.count("\nkimi_k3 ") == 1
