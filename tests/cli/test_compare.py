"""`fusiontree compare` and `ablate`: what they show before anything is trained; bad input is in test_errors.py."""

from pathlib import Path

import pytest

from fusiontree.cli.values import amount
from fusiontree.errors import ConfigError
from tests.cli.conftest import Call
from tests.lab.grid.tiny import content, tiny_file


def test_the_plan_shows_sizes_and_how_closely_they_match(call: Call, tmp_path: Path) -> None:
    words = ("--plan", "--architectures", "llama,mamba2", "--params", "3M", "--seeds", "0,1", "--steps", "50")
    result = call("compare", *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "matched by parameters, 2 seeds" in result.output and "mamba2" in result.output and "%" in result.output
    assert not (tmp_path / "out").exists()


def test_overrides_without_a_file_reach_the_shipped_grid(call: Call) -> None:
    result = call("ablate", "training.steps=77", "--plan", "--changes", "no_srte,no_mlp")
    assert result.exit_code == 0, result.output
    assert "77" in result.output and "no_mlp" in result.output and "pre_norm" not in result.output


def test_the_changes_are_listed(call: Call) -> None:
    assert "no_srte: srte=none" in call("ablate", "--list").output


def test_a_small_comparison_from_the_command_line(call: Call, tmp_path: Path) -> None:
    path = tiny_file(tmp_path, measure={**content(tmp_path)["measure"], "step_repeats": 0, "speed_repeats": 0})
    words = ("compare", path, "architectures={llama: null}", "training.steps=2", "--out", tmp_path / "out")
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert "llama/seed-0: validation loss" in result.stdout and (tmp_path / "out" / "report.md").is_file()
    report = call("report", tmp_path / "out")
    assert report.exit_code == 0 and "report.html" in report.output


def test_amounts() -> None:
    assert [amount("--params", text) for text in ("2.5M", "1e3", "3k", "1B")] == [2.5e6, 1e3, 3e3, 1e9]
    for text in ("many", "-1", "0", "M", "inf"):
        with pytest.raises(ConfigError, match="--params"):
            amount("--params", text)
