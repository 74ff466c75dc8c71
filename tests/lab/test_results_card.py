"""docs/results.md says what docs/results/*.json holds."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results_card as card  # noqa: E402


def test_the_tables_of_the_document_are_those_of_the_files() -> None:
    """`python scripts/results_card.py --write` writes them."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/results_card.py")], capture_output=True, text=True, check=True, timeout=60
    )
    document = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == len(card.TABLES)
    for table in tables:
        assert table in document


def test_all_models_were_asked_the_same() -> None:
    models = card.models()
    assert len(models) > 1
    for name, content in models.items():
        for key, task in models["fusiontree"]["tasks"].items():
            other = content["tasks"][key]
            for fact in ("version", "settings", "samples"):
                assert other[fact] == task[fact], (name, key, fact)


def test_what_is_compared_learned_from_as_many_tokens_and_with_its_best_rate() -> None:
    runs = card.runs()
    assert set(runs) == set(card.TWINS)
    assert len({(run["steps"], run["tokens"]) for run in runs.values()}) == 1
    sizes = [run["parameters"] for run in runs.values()]
    assert max(sizes) <= 1.02 * min(sizes)
    for name, run in runs.items():
        tried = {one["lr"]: one["validation"][-1][1] for one in card.load("training")["rates"] if one["name"] == name}
        assert len(tried) >= 2 and run["lr"] == min(tried, key=tried.__getitem__)


def windowed(rows: list[list[float]]) -> dict:
    return {"tasks": {"t/perplexity": {"windows": {"8": rows}}}}


def test_the_paired_difference_by_hand() -> None:
    bit = math.log(2)
    one, other = windowed([[12 * bit, 10], [34 * bit, 30]]), windowed([[10 * bit, 10], [30 * bit, 30]])
    mean, error = card.difference(one, other, "t", 8)
    # 2 bits in 10 bytes and 4 in 30: 6 / 40 together; the rests are 0.5 and -0.5.
    assert mean == pytest.approx(0.15)
    assert error == pytest.approx(math.sqrt(2 * 0.5) / 40)
    assert card.is_clear(mean, error) and not card.is_clear(0.04, error)


def test_a_single_window_is_never_clear() -> None:
    mean, error = card.difference(windowed([[3.0, 10]]), windowed([[1.0, 10]]), "t", 8)
    assert mean > 0 and math.isnan(error) and not card.is_clear(mean, error)
    assert card.shown_error(error) == "–"
