"""The table of `make matrix`: what a run of some rows leaves of the others."""

import pytest

from tools import matrix


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where the page and the environments are written instead; nothing is installed."""
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "matrix.md")
    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path / "environments")
    return tmp_path


def trying(monkeypatch, found: str) -> list[matrix.Row]:
    """Every row that is tried gets this result."""
    rows = []

    def tried(row: matrix.Row) -> matrix.Row:
        rows.append(row)
        return matrix.Row(framework=row.framework, wish=row.wish, python=row.python, versions="v", found=found)

    monkeypatch.setattr(matrix, "tried", tried)
    return rows


def test_named_rows_are_tried_and_the_others_kept(monkeypatch, folder):
    trying(monkeypatch, "5 passed")
    matrix.main([])
    assert [row.found for row in matrix.kept()] == ["5 passed"] * len(list(matrix.every_row()))
    again = trying(monkeypatch, "7 passed")
    matrix.main(["jax", "3.13", "newest"])
    assert [(row.framework, row.wish, row.python) for row in again] == [("jax", "newest", "3.13")]
    assert [row.found for row in matrix.kept()].count("7 passed") == 1
    assert "| jax, newest | 3.13 | v | 7 passed |" in matrix.PAGE.read_text()


def test_a_row_that_failed_is_in_the_table_and_fails_the_command(monkeypatch, folder):
    trying(monkeypatch, "2 failed, 3 passed")
    with pytest.raises(SystemExit):
        matrix.main(["torch", "oldest"])
    assert matrix.PAGE.read_text().count("2 failed, 3 passed |") == 2
    assert matrix.PAGE.read_text().count("not tried yet |") == 7


def test_the_oldest_are_those_that_the_package_asks_for():
    asked = (matrix.ROOT / "pyproject.toml").read_text()
    for framework, wish in matrix.OLDEST.items():
        oldest = wish.split()[0].partition("==")[2].removesuffix(".*").removesuffix(".0")
        assert f'"{framework}>={oldest}"' in asked, f"{framework}: pyproject.toml asks for another one than {oldest}"


def test_the_last_line_of_pytest_is_read(monkeypatch, tmp_path):
    class Done:
        returncode, stderr = 1, ""
        stdout = "...\n1 failed, 12 passed, 2 errors in 3.21s\n"

    monkeypatch.setattr(matrix.subprocess, "run", lambda *_, **__: Done)
    (tmp_path / "bin").mkdir()
    row = matrix.Row(framework="jax", wish="newest", python="3.13")
    assert matrix.tests_in(tmp_path / "bin" / "python", row) == "1 failed, 12 passed, 2 errors"
