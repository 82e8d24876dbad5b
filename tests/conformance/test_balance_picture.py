"""tests of the judge: the load command shows that updates of the bias even a skewed load, and refuses the rest."""

import argparse
import sys

import numpy as np
import pytest

from conformance.pictures.balance import Run, simulate, table
from conformance.run.cli import EXIT_USAGE, main
from moe_ref import BiasUpdateSpec, RouterSpec
from moe_ref.specs.families import family

SMALL = ("lfm2_moe", "--steps", "40", "--tokens", "256", "--rate", "0.02")


def rows_of(printed: str) -> list[list[float]]:
    """The cells of the lines of the table."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[float(cell) for cell in line.strip("|").split("|")] for line in lines[2:]]


def simulated(router: RouterSpec, rate: float, **changes) -> Run:
    defaults = {"steps": 40, "tokens": 256, "skew": 1.0, "distribution": None, "seed": 0}
    options = argparse.Namespace(**(defaults | changes))
    return simulate("a run", "0.5", router, BiasUpdateSpec(rate=rate), options)


def test_updates_even_a_skewed_load(capsys):
    assert main(["load", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "lfm2_moe: 32 experts, 4 of them for each token; bias updates: 40, of rate 0.02; 256 tokens" in printed
    rows = rows_of(printed)
    assert [row[0] for row in rows] == [0, 10, 20, 40]
    _, without, evened, idle_without, idle_evened = rows[0]
    assert (without, idle_without) == (evened, idle_evened)
    _, without, evened, idle_without, idle_evened = rows[-1]
    assert evened < without / 2
    assert idle_evened < idle_without


def test_an_update_of_rate_0_leaves_the_load(capsys):
    assert main(["load", *SMALL, "--rate", "0"]) == 0
    assert all(row[1] == row[2] and row[3] == row[4] for row in rows_of(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["deepseek_v3", "zaya", "inkling", "gemma4"])
def test_groups_null_experts_and_learned_scales_are_no_hindrance(name):
    router = family(name).tiny
    still, evened = simulated(router, 0.0), simulated(router, 0.02)
    assert evened.counts_BE.shape == (41, router.num_experts)
    assert evened.ratios_B[-10:].mean() < still.ratios_B[-10:].mean()


def test_the_seed_names_the_run():
    router = family("deepseek_v3").tiny
    first, again, other = (simulated(router, 0.01, steps=3, seed=seed).counts_BE for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_the_table_has_what_the_counts_say():
    runs = (
        Run(name="a", colour="0.5", counts_BE=np.array([[8, 0, 0, 0], [4, 4, 0, 0]])),
        Run(name="b", colour="0.5", counts_BE=np.array([[8, 0, 0, 0], [2, 2, 3, 1]])),
    )
    assert table(runs)[2:] == ["| 0 | 4.00 | 4.00 | 3 | 3 |", "| 1 | 2.00 | 1.50 | 2 | 0 |"]
    assert runs[1].ranked_E.tolist() == [1.5, 1, 1, 0.5]


def test_a_plot_is_drawn(tmp_path, capsys):
    assert main(["load", *SMALL, "--steps", "2", "--plot", str(tmp_path / "l.png")]) == 0
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert rows_of(capsys.readouterr().out)


def test_a_plot_that_cannot_be_written_is_a_usage_error(tmp_path, capsys):
    for name in ("nowhere/l.png", "l.unknown"):
        assert main(["load", *SMALL, "--steps", "1", "--plot", str(tmp_path / name)]) == EXIT_USAGE
        assert f"--plot {tmp_path / name}: " in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (("deepsek_v3",), "unknown family 'deepsek_v3' (did you mean deepseek_v3?)"),
    (("phimoe",), "selector is 'sparsemixer', which takes no bias"),
    (("deepseek_v4_hash",), "selector is 'table', which takes no bias"),
    (("mixtral", "--rate", "-1"), "rate is -1.0; it is a finite number of at least 0.0"),
    (("mixtral", "--distribution", "zipf:-1"), "the exponent of zipf is -1.0; it is a finite number of at least 0.0"),
    (("mixtral", "--skew", "nan"), "skew is nan; it is a finite number of at least 0.0"),
    (("mixtral", "--seed", "-1"), "seed is -1; it is an integer at least 0"),
])  # fmt: skip
def test_what_cannot_be_evened_is_a_usage_error(options, message, capsys):
    assert main(["load", *options]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize("option", ["--steps", "--tokens"])
def test_at_least_one_step_and_one_token_are_there(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["load", "mixtral", option, "0"])
    assert stopped.value.code == EXIT_USAGE
    assert "0 is not at least 1" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_a_usage_error(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["load", *SMALL, "--plot", "never.png"]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert "matplotlib, which is not installed: pip install matplotlib" in captured.err
    assert not captured.out
