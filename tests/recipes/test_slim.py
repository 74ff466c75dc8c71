"""The whole road on a tiny model that was really trained: plan, export, healing, table, and going on after a stop."""

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fusiontree.deploy.loading import load_saved_tokenizer
from fusiontree.deploy.plan import load_plan, removals, save_plan
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.models.loading import load_model
from fusiontree.recipes.slim import SlimRow, healing_config, slim, slim_table
from fusiontree.train import RunConfig, latest_checkpoint, train

TEXT = "\n\n".join(f"def add_{n}(a, b):\n    return a + b + {n}" for n in range(400))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished training run: its settings, its newest checkpoint, and a loss on text it did not see."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    config = RunConfig.model_validate(
        {
            "model": {
                "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": 8,
                "mamba_d_state": 8, "mamba_head_dim": 16, "mamba_chunk_size": 16, "gate_rank": 8,
            },
            "training": {
                "steps": 60, "sequence_length": 64, "micro_batch_size": 8, "lr": 1e-2, "precision": "fp32",
                "validation_every": None, "save_every": None,
            },
            "data": {
                "train": [{"path": str(folder / "text.txt")}], "validation": [{"path": str(folder / "text.txt")}],
                "tokenizer": {"path": "byte"},
            },
            "logging": {"console": "off", "tensorboard": False},
            "system": {"run_dir": str(folder / "run"), "device": "cpu"},
        }
    )  # fmt: skip
    train(config)
    model_path = latest_checkpoint(folder / "run")
    assert model_path is not None
    ids = load_saved_tokenizer(model_path)(TEXT[5000:7048], return_tensors="pt")["input_ids"].view(16, -1)

    def evaluate(model: Any) -> float:
        return float(model(ids, labels=ids, use_cache=False).loss)

    healing = healing_config(config, model_path, steps=25, lr=5e-3)
    return SimpleNamespace(config=config, model_path=model_path, evaluate=evaluate, healing=healing)


def made_up_speed(models: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: SimpleNamespace(prefill_tokens_per_second=100.0 + i, decode_tokens_per_second=10.0 + i)
        for i, name in enumerate(models)
    }


def road(run: SimpleNamespace, out: Path, **changes: Any) -> Any:
    options = {
        "max_loss_increase": 0.5, "healing": run.healing, "measure_speed": made_up_speed, "evaluation_id": "text",
        "evaluate": run.evaluate,
    }  # fmt: skip
    return slim(run.model_path, out, **{**options, **changes})


@pytest.fixture(scope="module")
def finished(run: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("slim") / "out"
    return SimpleNamespace(out=out, result=road(run, out))


def test_the_table_compares_full_pruned_and_healed(run: SimpleNamespace, finished: SimpleNamespace) -> None:
    full, pruned, healed = finished.result.rows
    assert [full.name, pruned.name, healed.name] == ["full", "pruned", "healed"]
    plan = finished.result.plan
    assert full.validation_loss == pytest.approx(plan.baseline_loss, abs=1e-6)
    assert pruned.validation_loss == pytest.approx(plan.predicted_loss, abs=1e-4)
    assert full.validation_loss < pruned.validation_loss <= full.validation_loss + 0.5
    assert healed.validation_loss < pruned.validation_loss
    assert healed.parameters == pruned.parameters < full.parameters
    assert abs(healed.bytes - pruned.bytes) < 1000 and pruned.bytes < full.bytes
    assert (full.decode_tokens_per_second, healed.prefill_tokens_per_second) == (10.0, 102.0)


def test_every_model_is_an_ordinary_checkpoint_with_tokenizer(finished: SimpleNamespace) -> None:
    for folder in finished.result.folders.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = load_saved_tokenizer(folder)("def add", return_tensors="pt")["input_ids"]
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1] + 4


def test_healing_keeps_the_cut_and_leaves_the_full_model_as_it_was(
    run: SimpleNamespace, finished: SimpleNamespace
) -> None:
    pruned, healed = (load_model(finished.out / name) for name in ("pruned", "healed"))
    assert pruned.config.layers == healed.config.layers
    assert set(pruned.state_dict()) == set(healed.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(pruned.parameters(), healed.parameters(), strict=True))
    with torch.no_grad():
        assert run.evaluate(load_model(run.model_path)) == finished.result.rows[0].validation_loss


def test_started_again_nothing_is_done_again(run: SimpleNamespace, finished: SimpleNamespace) -> None:
    def never(_: Any) -> Any:
        raise AssertionError("a finished stage was done again")

    before = {p: p.stat().st_mtime_ns for p in finished.out.rglob("*") if p.is_file()}
    again = road(run, finished.out, evaluate=never, measure_speed=never)
    assert again.rows == finished.result.rows and again.plan == finished.result.plan
    assert {p: p.stat().st_mtime_ns for p in finished.out.rglob("*") if p.is_file()} == before


def test_interrupted_in_any_stage_it_goes_on_to_the_same_end(
    run: SimpleNamespace, finished: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stops_at(limit: int) -> Any:
        def evaluate(model: Any) -> float:
            calls.append(1)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return run.evaluate(model)

        return evaluate

    with pytest.raises(KeyboardInterrupt, match="start again"):
        road(run, tmp_path / "out", evaluate=stops_at(4))
    measured = (tmp_path / "out" / "plan.measurements.jsonl").read_text().count('"loss"')
    assert measured == 4 and not (tmp_path / "out" / "plan.json").exists()

    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fusiontree.recipes.slim.train", stopped)
        with pytest.raises(KeyboardInterrupt):
            road(run, tmp_path / "out")
    assert (tmp_path / "out" / "pruned" / "export.json").exists()
    result = road(run, tmp_path / "out")
    assert result.plan == finished.result.plan
    assert result.rows == finished.result.rows


def test_other_settings_in_the_same_folder_are_refused(run: SimpleNamespace, finished: SimpleNamespace) -> None:
    longer = healing_config(run.config, run.model_path, steps=26, lr=5e-3)
    for name, changes in {
        "max_loss_increase": {"max_loss_increase": 0.4}, "evaluation_id": {"evaluation_id": "other"},
        "healing": {"healing": longer},
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"another {name}"):
            road(run, finished.out, **changes)


def test_without_budget_or_healing_there_is_less_to_show(run: SimpleNamespace, tmp_path: Path) -> None:
    result = road(run, tmp_path / "none", max_loss_increase=0.0, measure_speed=None)
    if not removals(result.plan, load_model(run.model_path)):
        assert [row.name for row in result.rows] == ["full", "pruned"]
        assert result.rows[0].parameters == result.rows[1].parameters
    result = road(run, tmp_path / "unhealed", healing=None, measure_speed=None)
    assert [row.name for row in result.rows] == ["full", "pruned"]
    assert result.rows[0].decode_tokens_per_second is None
    written = json.loads((tmp_path / "unhealed" / "slim.json").read_text())["rows"]
    assert written[1]["parameters"] == result.rows[1].parameters


def test_an_edited_plan_is_used_and_after_the_export_refused(run: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    road(run, out, healing=None, measure_speed=None)
    plan = load_plan(out / "plan.json")
    save_plan(plan.model_copy(update={"layers": []}), out / "plan.json")
    with pytest.raises(ConfigError, match=r"plan\.json: was edited"):
        road(run, out, healing=None, measure_speed=None)
    edited = tmp_path / "edited"
    edited.mkdir()
    save_plan(plan.model_copy(update={"layers": []}), edited / "plan.json")
    rows = road(run, edited, healing=None, measure_speed=None).rows
    assert rows[0].parameters == rows[1].parameters


def test_a_foreign_table_is_refused(run: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "slim.json").write_text('{"rows": [1]}')
    with pytest.raises(CheckpointError, match="not written by this recipe"):
        road(run, tmp_path)


def test_the_printed_table_shows_the_changes() -> None:
    rows = [SlimRow("full", 1000, 4_000_000, 2.0, 100.0, 50.0), SlimRow("pruned", 750, 3_000_000, 2.1, None, 60.0)]
    console = Console(width=160, record=True, file=StringIO())
    console.print(slim_table(rows))
    text = console.export_text()
    for part in ("1,000", "750 (-25.0%)", "3.0 MB (-25.0%)", "2.1000 (+0.1000)", "60 (+20.0%)", "–"):
        assert part in text
