from pathlib import Path

import pytest

from fusiontree.errors import ConfigError, DataError, TrainingError
from fusiontree.lab.grid import runs
from fusiontree.lab.grid.folder import FILE, read_results
from fusiontree.lab.grid.report import markdown, write_grid_report
from fusiontree.lab.grid.runs import best_rate, run_grid
from fusiontree.lab.grid.tables import by_length, effects, losses, sweep, tables, terms
from fusiontree.lab.grid.view import View
from fusiontree.train import Callback
from tests.lab.grid.tiny import content, tiny_ablation, tiny_grid
from tests.lab.test_report import Balanced

QUIET = {"say": lambda line: None}


def steady(content: dict) -> dict:
    """The part of results.json that a second run must give again."""
    found = {key: content[key] for key in ("contenders", "sweep", "tokenizer")}
    kept = ("validation", "by_length", "tasks", "seed", "lr")
    found["runs"] = {key: {name: run[name] for name in kept} for key, run in content["runs"].items()}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """Two architectures, two seeds and a sweep."""
    training = {key: value for key, value in content(folder)["training"].items() if key != "lr"}
    changes = {"seeds": [0, 1], "sweep": {"lrs": [1e-3, 1e-2], "steps": 2}, "training": training}
    run_grid(tiny_grid(folder, **changes), "compare", folder / "whole", command="a command | piped", **QUIET)
    return folder / "whole"


def test_everything_is_measured(finished):
    found = read_results(finished / FILE)
    assert list(found["runs"]) == ["llama/seed-0", "mamba2/seed-0", "llama/seed-1", "mamba2/seed-1"]
    for run in found["runs"].values():
        assert 0 < run["validation"]["loss"] < 6 and run["validation"]["standard_error"] > 0
        assert run["validation"]["bits_per_byte"] > 0 and run["training"]["steps"] == 4
        assert set(run["by_length"]) == {"1", "2"} and 0 <= run["tasks"]["recall"]["accuracy"] <= 100
        assert run["by_length"]["1"]["beyond"] == 0 < run["by_length"]["2"]["beyond"]
    for turns in found["turns"].values():
        assert turns["step_ms"] > 0 and turns["decode_ms_per_token"] > 0 and turns["prefill_ms_per_token"] > 0
        assert turns["step_memory_bytes"] > 0 and turns["prompt_length"] == 8
    assert not list(finished.glob("runs/*/lr-*/checkpoints")), "checkpoints of the sweep are of no use"


def test_the_sweep_is_the_same_for_all_and_its_best_rate_is_taken(finished):
    found = read_results(finished / FILE)
    for name in ("llama", "mamba2"):
        tried = {entry["lr"]: entry["loss"] for entry in found["sweep"].values() if entry["architecture"] == name}
        assert set(tried) == {1e-3, 1e-2}
        assert {run["lr"] for run in found["runs"].values() if run["architecture"] == name} == {
            min(tried, key=lambda rate: tried[rate])
        }
    assert any("✓" in cell for cell in sweep(View(found)).rows[0])


def test_a_finished_grid_is_not_repeated(folder, finished, monkeypatch):
    before = read_results(finished / FILE)
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("a finished run was trained again"))
    monkeypatch.setattr(runs, "measure_turns", lambda *_: pytest.fail("measured again"))
    training = {key: value for key, value in content(folder)["training"].items() if key != "lr"}
    changes = {"seeds": [0, 1], "sweep": {"lrs": [1e-3, 1e-2], "steps": 2}, "training": training}
    run_grid(tiny_grid(folder, **changes), "compare", finished, **QUIET)
    after = read_results(finished / FILE)
    assert {**after, "started": []} == {**before, "started": []} and len(after["started"]) == 2


class Killed(BaseException):
    pass


class Killer(Callback):
    name = "killer"

    def __init__(self, inner: Callback, at: int) -> None:
        self.inner, self.at = inner, at

    def on_start(self, run):
        self.inner.on_start(run)

    def on_step(self, run):
        self.inner.on_step(run)
        if run.step == self.at:
            raise Killed


def test_a_killed_grid_goes_on_and_gives_the_same_table(folder, monkeypatch):
    """Killed in the second run after its checkpoint at step 2: the first is kept, the second resumed at step 2."""
    grid, out = tiny_grid(folder), folder / "killed"
    real, trained = runs.train, []

    def train(run, callbacks):
        trained.append(Path(run.system.run_dir).parent.name)
        return real(run, callbacks=[Killer(callbacks[0], 3)] if len(trained) == 2 else callbacks)

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(Killed):
        run_grid(grid, "compare", out, **QUIET)
    assert list(read_results(out / FILE)["runs"]) == ["llama/seed-0"]
    shown: list[str] = []
    run_grid(grid, "compare", out, progress=lambda done, total, text: shown.append(text), **QUIET)
    assert trained == ["llama", "mamba2", "mamba2"]
    assert any("mamba2/seed-0: from step 2 of 4" in text for text in shown)
    monkeypatch.setattr(runs, "train", real)
    run_grid(grid, "compare", folder / "undisturbed", **QUIET)
    first, second = (read_results(folder / name / FILE) for name in ("killed", "undisturbed"))
    assert steady(first) == steady(second)
    for table in (losses, terms, by_length):
        assert table(View(first)) == table(View(second))


def test_a_folder_of_another_grid_is_refused_and_left_alone(folder, finished, tmp_path):
    before = (finished / FILE).read_bytes()
    for changes, difference in (
        ({}, r"measure|sweep|training.lr"),
        ({"measure": {"cache_lengths": [7]}}, "belongs to another grid"),
        ({"data": {**content(folder)["data"], "validation_fraction": 0.5}}, "belongs to another grid"),
    ):
        with pytest.raises(ConfigError, match=difference):
            run_grid(tiny_grid(folder, **changes), "compare", finished, **QUIET)
    with pytest.raises(ConfigError, match="belongs to another grid"):
        run_grid(tiny_ablation(folder), "ablate", finished, **QUIET)
    assert (finished / FILE).read_bytes() == before
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="no grid made it"):
        run_grid(tiny_grid(folder), "compare", tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="is a file"):
        run_grid(tiny_grid(folder), "compare", tmp_path / "mine.txt", **QUIET)


def test_a_run_of_other_sizes_is_not_taken_for_the_same(folder):
    out = folder / "killed_sizes"
    grid = tiny_grid(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_grid(grid, "compare", out, **QUIET)
    changed = tiny_grid(folder, architectures={"llama": {"model": {"intermediate_size": 48}}, "mamba2": None})
    with pytest.raises(ConfigError, match="belongs to another grid: llama: model was"):
        run_grid(changed, "compare", out, **QUIET)


def test_bad_input_leaves_nothing_behind(folder, tmp_path):
    for changes in ({"architectures": {"rnn": None}}, {"data": {**content(folder)["data"], "train": [{"path": "no"}]}}):
        with pytest.raises((ConfigError, DataError)):
            run_grid(tiny_grid(folder, **changes), "compare", tmp_path / "out", **QUIET)
        assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_told_and_the_others_go_on(folder, monkeypatch):
    real = runs.train

    def train(run, callbacks):
        if "llama" in run.system.run_dir:
            raise TrainingError("step 1: loss is not finite")
        return real(run, callbacks=callbacks)

    monkeypatch.setattr(runs, "train", train)
    said: list[str] = []
    run_grid(tiny_grid(folder), "compare", folder / "failing", say=said.append)
    found = read_results(folder / "failing" / FILE)
    assert found["failed"] == {"llama/seed-0": "step 1: loss is not finite"} and list(found["turns"]) == ["mamba2"]
    assert any("not finite" in line for line in said)
    assert losses(View(found)).rows[0][1] == "step 1: loss is not finite"


def test_a_sweep_in_which_all_diverge_is_an_error():
    entries = {"a": {"architecture": "a", "lr": 1.0, "why": "nan"}, "b": {"architecture": "b", "lr": 1.0, "loss": 2.0}}
    assert best_rate(entries, "b") == 1.0
    with pytest.raises(TrainingError, match=r"a: no learning rate of the sweep \(1\) came to a loss"):
        best_rate(entries, "a")


def test_the_report_is_whole(finished):
    page, text, *pictures = write_grid_report(finished)
    parsed = Balanced(page.read_text(encoding="utf-8"))
    view = View(read_results(finished / FILE))
    for table in tables(view):
        assert table.title in parsed.text and f"## {table.title}" in text.read_text(encoding="utf-8")
        assert all(len(row) == len(table.head) for row in table.rows)
    assert page.read_text(encoding="utf-8").count("<svg") == len(pictures) == 3
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    assert len(parsed.ids) == len(set(parsed.ids)) and not {"script", "link", "img"} & parsed.tags
    assert "a command \\| piped" in markdown(view, [], []) and "a command | piped" in parsed.text


def test_a_model_that_cannot_read_longer_rows_says_why(finished):
    found = read_results(finished / FILE)
    for run in found["runs"].values():
        if run["architecture"] == "llama":
            run["by_length"]["2"] = {"why": "learned positions end at 32"}
    table = by_length(View(found))
    assert table.rows[0][2] == "learned positions end at 32" and "±" in table.rows[1][2]


def test_ablation_reports_effects_with_errors(folder):
    """Over windows with one seed; a second seed is added to the same folder, and then they are over seeds."""
    out = folder / "ablation"
    run_grid(tiny_ablation(folder), "ablate", out, **QUIET)
    found = View(read_results(out / FILE))
    one = found.effect("no_srte")
    own, base = (found.runs(name)[0]["validation"]["loss"] for name in ("no_srte", "base"))
    assert one is not None and one.over == "windows" and one.error is not None
    assert one.mean == pytest.approx(own - base, abs=1e-4)
    run_grid(tiny_ablation(folder, seeds=[0, 1]), "ablate", out, **QUIET)
    found = View(read_results(out / FILE))
    two = found.effect("no_srte")
    assert two is not None and two.over == "seeds" and two.error is not None
    rows = effects(found).rows
    assert [row[0] for row in rows] == ["base", "no_srte", "pre_norm"] and "±" in rows[1][2] and rows[1][-1] == "2"
    assert {path.name for path in write_grid_report(out)[2:]} >= {"effects.png"}
