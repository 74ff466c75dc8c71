"""What a family's tasks come to together, from the runner to the table on the screen and the picture."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fusiontree.eval.groups import group_results, macro_average
from fusiontree.eval.plots import draw_plots
from fusiontree.eval.registry import find_tasks
from fusiontree.eval.results import results_table
from fusiontree.eval.run import Outcome, evaluate, settings_of
from fusiontree.eval.task import TaskSettings
from tests.eval.subjects import subject

SETTINGS = TaskSettings(limit=1, lengths=(1500,))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Outcome]:
    """Two tasks of a family, asked one after the other in one folder."""
    out, asked = tmp_path_factory.mktemp("groups") / "out", subject("llama", 1500)
    return tuple(evaluate(asked, find_tasks(name), SETTINGS, out) for name in ("ruler:niah_single_1", "ruler:fwe"))


def test_tasks_asked_earlier_in_the_folder_count(done: tuple[Outcome, Outcome]) -> None:
    first, second = done
    assert list(first.groups["ruler"]["tasks"]) == ["ruler:niah_single_1"]
    ruler = json.loads(second.path.read_text())["groups"]["ruler"]
    assert ruler == json.loads(json.dumps(second.groups["ruler"]))
    assert list(ruler["tasks"]) == ["ruler:niah_single_1", "ruler:fwe"] and ruler["of"] == 13
    assert ruler["metrics"].keys() == {"effective_length", "score@1500"}
    assert ruler["tasks"]["ruler:niah_single_1"]["metric"] == "score"


def test_other_settings_another_family_or_none_do_not_count(done: tuple[Outcome, Outcome]) -> None:
    tasks = json.loads(done[1].path.read_text())["tasks"]
    assert group_results({"ruler"}, tasks, settings_of(TaskSettings(limit=2, lengths=(1500,)))) == {}
    assert group_results({"longbench", "needle", "mine"}, tasks, settings_of(SETTINGS)) == {}
    elsewhere = settings_of(TaskSettings(limit=1, lengths=(1500,), data=Path("elsewhere")))
    assert len(group_results({"ruler"}, tasks, elsewhere)["ruler"]["tasks"]) == 2


def test_the_table_and_the_pictures(done: tuple[Outcome, Outcome], tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table("model", done[1].results, done[1].groups))
    assert "all ruler" in console.export_text()
    drawn = draw_plots(done[1].results, done[1].groups, tmp_path / "plots", "model")
    assert [path.name for path in drawn] == ["ruler_grid.png", "ruler.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_the_average_is_that_of_the_categories() -> None:
    found = macro_average({"a": 10.0, "b": 20.0, "c": 60.0, "d": None}, {"x": "ab", "y": "cz", "none": "d"})
    assert found["average"] == 37.5 and [row["tasks"] for row in found["categories"]] == [2, 1]
    assert macro_average({}, {"x": "ab"})["average"] is None
