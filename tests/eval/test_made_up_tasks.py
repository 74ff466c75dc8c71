"""The made-up tasks go through the runner with a model of ours, and their grids become pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusiontree.eval.heatmap import draw_grids
from fusiontree.eval.recall import RecallProbe
from fusiontree.eval.registry import FAMILIES, check_settings, find_tasks
from fusiontree.eval.run import evaluate
from fusiontree.eval.task import TaskSettings
from tests.eval.subjects import subject


def test_needles_documents_and_lists_from_question_to_picture(tmp_path: Path) -> None:
    names = ("needle", "needle_multi", "needle_code", "ruler:fwe")
    settings = TaskSettings(limit=2, lengths=(800,), depths=(0, 100), options={"new_tokens": "4"})
    check_settings(names, settings)
    outcome = evaluate(subject(length=800), find_tasks(*names), settings, tmp_path / "out")
    assert not outcome.failed and set(outcome.results) == set(names)
    tasks = json.loads(outcome.path.read_text())["tasks"]
    for name in names:
        assert tasks[name]["samples"] == 2 and 0 <= tasks[name]["metrics"][tasks[name]["main_metric"]] <= 100
        drawn = draw_grids(tasks[name]["tables"], tmp_path, name)
        assert all(path.stat().st_size > 5000 for path in drawn) and bool(drawn) == name.startswith("needle")


def test_recall_of_pairs_names_and_letters(tmp_path: Path) -> None:
    model = subject(length=800)
    settings = TaskSettings(limit=3, lengths=(64,), options={"vocabulary": "256"})
    outcome = evaluate(model, find_tasks("mqar"), settings, tmp_path / "pairs")
    assert outcome.results["mqar"]["samples"] == 3 and outcome.results["mqar"]["metrics"]["accuracy"] <= 100
    settings = TaskSettings(limit=2, options={"sizes": "3,6"})
    outcome = evaluate(model, find_tasks("copy", "phonebook"), settings, tmp_path / "lists")
    assert not outcome.failed and all(result["errors"] != {} for result in outcome.results.values())


def test_recall_is_what_the_probe_says_while_training(tmp_path: Path) -> None:
    model = subject()
    settings = TaskSettings(limit=40, seed=3, options={"pairs": "4,8"})
    outcome = evaluate(model, find_tasks("recall"), settings, tmp_path / "words")
    with torch.no_grad():
        told = RecallProbe(model.tokenizer, (4, 8), 40, seed=3)(model.model)
    metrics = outcome.results["recall"]["metrics"]
    assert {name: share for name, share in metrics.items() if "@" in name} == {
        f"accuracy@{pairs}": 100 * share for pairs, share in told.items()
    }
    assert outcome.results["recall"]["tables"]["by_pairs"][1]["questions"] == 40
    usual = evaluate(model, find_tasks("recall"), TaskSettings(limit=8), tmp_path / "usual").results["recall"]
    assert set(usual["metrics"]) == {"accuracy", "accuracy@4", "accuracy@8", "accuracy@16"}, "the bytes have 52 letters"


@pytest.mark.parametrize(
    ("pairs", "said"), [("100", "100 pairs are 400 tokens, the model may see 256"), ("40", "40 pairs need 80 tokens")]
)
def test_more_pairs_than_there_can_be(pairs: str, said: str, tmp_path: Path) -> None:
    settings = TaskSettings(options={"pairs": pairs})
    outcome = evaluate(subject(), find_tasks("recall"), settings, tmp_path / "out")
    assert said in str(outcome.failed["recall"])


def test_every_family_of_these_is_in_the_table() -> None:
    assert {"copy", "mqar", "needle", "needle_code", "needle_multi", "phonebook", "recall", "ruler"} <= set(FAMILIES)
