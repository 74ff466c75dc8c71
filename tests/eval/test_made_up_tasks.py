"""The made-up tasks go through the runner with a model of ours, and their grids become pictures."""

from __future__ import annotations

import json
from pathlib import Path

from fusiontree.eval.heatmap import draw_grids
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


def test_every_family_of_these_is_in_the_table() -> None:
    assert {"copy", "mqar", "needle", "needle_code", "needle_multi", "phonebook", "ruler"} <= set(FAMILIES)
