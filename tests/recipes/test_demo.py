"""The demo end to end on a toy model: every promised file, interruption and going on, and its settings."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusiontree.deploy import load_model, load_plan
from fusiontree.errors import ConfigError
from fusiontree.recipes import demo
from fusiontree.recipes.pace import find_pace
from fusiontree.train import load_config

ROOT = Path(__file__).resolve().parents[2]


def recorded() -> Console:
    return Console(file=io.StringIO(), width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def killed(*_: object, **__: object) -> Any:
    raise Killed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo that was interrupted after each stage, and what the last start printed."""
    out = tmp_path_factory.mktemp("demo") / "run"
    for stage in ("_slim", "_samples", "write_report"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, stage, killed)
            with pytest.raises(Killed):
                demo.run_demo(out, tiny=True, console=recorded())
    console = recorded()
    assert demo.run_demo(out, tiny=True, console=console) == out / "report.html"
    return out, shown(console)


def test_every_promised_file_is_there(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "gates.jsonl",
        "summary.json",
        "tokenizer/tokenizer.json",
        "plan.json",
    ):
        assert (out / name).is_file(), name
    for name in ("pruned/model.safetensors", "healed/model.safetensors", "slim.json", "samples.json", "report.html"):
        assert (out / name).is_file(), name
    assert list(out.glob("plots/*.png"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "healed" in page and "def read_lines(path):" in page


def test_the_steps_are_those_of_an_uninterrupted_run(finished: tuple[Path, str]) -> None:
    out, printed = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "lm_loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == demo.TINY_PACE.steps
    assert "going on with the demo" in printed


def test_what_a_person_sees(finished: tuple[Path, str]) -> None:
    _, printed = finished
    for words in ("validation loss", "Gates at step 12", "the export equals the masked original", "Before and after"):
        assert words in printed, words
    for name in ("full", "pruned", "healed"):
        assert printed.count(name) >= 1 + len(demo.PROMPTS)


def test_the_pruned_model_is_what_the_plan_says(finished: tuple[Path, str]) -> None:
    out, _ = finished
    plan, pruned, healed = load_plan(out / "plan.json"), load_model(out / "pruned"), load_model(out / "healed")
    kept = [layer["mixers"] for layer in pruned.config.layers]
    assert kept == [["mamba", "attention"] if entry.keep == "both" else [entry.keep] for entry in plan.layers]
    assert pruned.num_parameters() == healed.num_parameters() < load_model(_checkpoint(out)).num_parameters()
    assert json.loads((out / "pruned" / "export.json").read_text())["relative_error"] <= 1e-4


def _checkpoint(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def test_a_folder_of_the_other_kind_is_refused(finished: tuple[Path, str]) -> None:
    with pytest.raises(ConfigError, match="begun with --tiny; give another --out"):
        demo.run_demo(finished[0], tiny=False, console=recorded())


def test_the_shipped_settings_are_those_of_the_recipe() -> None:
    shipped = load_config(ROOT / "configs" / "demo.yaml")
    recipe = demo.demo_config(Path("runs/demo"))
    assert recipe.model_copy(update={"data": shipped.data}) == shipped
    assert recipe.data.model_copy(update={"cache_dir": shipped.data.cache_dir}) == shipped.data


def test_the_demo_model_has_4_to_8_million_parameters() -> None:
    from fusiontree.cli.info import read_target
    from fusiontree.models.accounting import account

    config = read_target(ROOT / "fusiontree" / "recipes" / "demo.yaml").config
    assert 4e6 <= account(config).total_parameters <= 8e6


def test_more_time_means_more_steps(tmp_path: Path) -> None:
    config = demo.demo_config(tmp_path, demo.TINY)
    sized = config.model_copy(update={"model": {**config.model, "vocab_size": 512}})
    short, long = find_pace(sized, 5), find_pace(sized, 100)
    assert 20 <= short.steps < long.steps and short.precision in ("bf16", "fp32")
    assert 5 <= short.healing_steps <= long.healing_steps
    assert 2 <= short.measured_batches <= long.measured_batches
