"""From a trained model to a smaller one: measure → plan → export → heal → table. Finished stages are kept.

The output folder holds `plan.json`, `pruned/`, `healing/` (a training run), `healed/` and `slim.json` (the table).
Started again on the same folder, it goes on with the first stage that is not finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from fusiontree.deploy.apply import apply_plan
from fusiontree.deploy.export import EXPORT_MARK, PLAN_COPY, export_pruned_model
from fusiontree.deploy.files import new_folder, write_json
from fusiontree.deploy.fingerprint import model_fingerprint
from fusiontree.deploy.greedy import make_plan
from fusiontree.deploy.loading import copy_tokenizer_files
from fusiontree.deploy.measure import Evaluate
from fusiontree.deploy.plan import PrunePlan, load_plan, removals, save_plan
from fusiontree.deploy.progress import ProgressFn, silent
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.models import HybridLanguageModel
from fusiontree.models.json_files import read_json
from fusiontree.models.loading import load_model, weight_files
from fusiontree.train import RunConfig, latest_checkpoint, train

HEALED_MARK = "healing.json"
MAX_TABLE_BYTES = 1024 * 1024

MeasureSpeed = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Name → model in, name → result with prefill_tokens_per_second and decode_tokens_per_second out."""


@dataclass(frozen=True)
class SlimRow:
    """One model of the table; loss in nats per token, speeds in tokens per second (None: not measured)."""

    name: str
    parameters: int
    bytes: int
    validation_loss: float
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None


@dataclass(frozen=True)
class SlimResult:
    """The plan, the model folders by name (full, pruned, healed) and their table."""

    plan: PrunePlan
    folders: dict[str, Path]
    rows: list[SlimRow]


def slim(
    model_path: str | Path,
    out_dir: str | Path,
    evaluate: Evaluate,
    *,
    max_loss_increase: float,
    healing: RunConfig | None = None,
    measure_speed: MeasureSpeed | None = None,
    saving: Literal["bytes", "flops"] = "bytes",
    proposal: PrunePlan | None = None,
    evaluation_id: str = "",
    device: str | torch.device = "cpu",
    on_progress: ProgressFn = silent,
) -> SlimResult:
    """Prune the model of a folder within a loss budget, heal it by distillation from the full one, and compare.

    `evaluate` gives the loss on held-out text that `evaluation_id` names; `healing` is a run made by `healing_config`
    (None: no healing). Raises ConfigError when the folder was begun with other settings.
    """
    out = Path(out_dir)
    full = load_model(model_path, device=device)
    settings = {
        "fingerprint": model_fingerprint(full),
        "max_loss_increase": max_loss_increase,
        "saving": saving,
        "evaluation_id": evaluation_id,
        "healing": None if healing is None else _settings_hash(healing),
    }
    known = _begin(out / "slim.json", settings)
    budget = {"max_loss_increase": max_loss_increase, "saving": saving, "proposal": proposal}
    plan = _plan(full, evaluate, out / "plan.json", budget, evaluation_id, on_progress)
    folders = {"full": Path(model_path), "pruned": _export(Path(model_path), out)}
    if healing is not None and removals(plan, full):
        folders["healed"] = _heal(full, plan, folders["full"], out, healing)
    if [row.name for row in known] == list(folders) and (measure_speed is None or known[0].decode_tokens_per_second):
        return SlimResult(plan, folders, known)
    rows = _measure(folders, evaluate, measure_speed, device)
    write_json(out / "slim.json", {"settings": settings, "rows": [asdict(row) for row in rows]}, CheckpointError)
    return SlimResult(plan, folders, rows)


def healing_config(
    run: RunConfig,
    model_path: str | Path,
    *,
    steps: int,
    lr: float,
    distill_weight: float = 1.0,
    temperature: float = 2.0,
) -> RunConfig:
    """The settings of a short distillation on the data of `run`, the run that trained the model of `model_path`."""
    content = run.model_dump()
    content["model"], content["probes"] = {}, {}  # the pruned model is handed in; it is measured afterwards
    content["data"]["tokenizer"] = {"path": str(model_path)}
    content["training"].update(steps=steps, lr=lr, warmup_steps=min(steps, max(1, steps // 10)), decay_fraction=0.5)
    content["training"].update(save_every=None, validation_every=None)
    content["training"]["loss"] = {
        "balance_weight": 0.0,  # gates may stay where they are
        "entropy_weight": 0.0,
        "sharpen_weight": 0.0,
        "distill_weight": distill_weight,
        "distill_temperature": temperature,
    }
    return RunConfig.model_validate(content)


def slim_table(rows: list[SlimRow]) -> Table:
    """The table for a terminal, each figure with its change against the first row."""
    table = Table(title="Before and after pruning")
    for heading in ("model", "parameters", "weights", "validation loss", "prefill tokens/s", "decode tokens/s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        first = rows[0]
        table.add_row(
            row.name,
            f"{row.parameters:,}{_change(row.parameters, first.parameters)}",
            f"{row.bytes / 1e6:.1f} MB{_change(row.bytes, first.bytes)}",
            f"{row.validation_loss:.4f}"
            + ("" if row is first else f" ({row.validation_loss - first.validation_loss:+.4f})"),
            _speed(row.prefill_tokens_per_second, first.prefill_tokens_per_second),
            _speed(row.decode_tokens_per_second, first.decode_tokens_per_second),
        )
    return table


def _change(value: float, base: float) -> str:
    return "" if value == base else f" ({value / base - 1:+.1%})"


def _speed(value: float | None, base: float | None) -> str:
    return "–" if value is None or base is None else f"{value:,.0f}{_change(value, base)}"


def _settings_hash(healing: RunConfig) -> str:
    """Names what decides the healed weights, not where they are written."""
    text = healing.model_dump_json(include={"training", "data"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _begin(path: Path, settings: Mapping[str, Any]) -> list[SlimRow]:
    """The rows of an earlier, finished call; ConfigError when it had other settings."""
    if not path.exists():
        write_json(path, {"settings": settings, "rows": []}, CheckpointError)
        return []
    content = read_json(path, MAX_TABLE_BYTES, CheckpointError)
    try:
        other = [name for name in settings if content["settings"].get(name) != settings[name]]
        rows = [SlimRow(**row) for row in content["rows"]]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: was not written by this recipe; give a new folder") from None
    if other:
        raise ConfigError(
            f"{path.parent}: was begun with another {other[0]}; give a new folder or the settings of before"
        )
    return rows


def _plan(
    full: HybridLanguageModel,
    evaluate: Evaluate,
    path: Path,
    budget: Mapping[str, Any],
    evaluation_id: str,
    on_progress: ProgressFn,
) -> PrunePlan:
    if path.exists():
        return load_plan(path)
    partial = path.with_name("plan.measurements.jsonl")
    plan = make_plan(
        full, evaluate, **budget, partial_path=partial, evaluation_id=evaluation_id, on_progress=on_progress
    )
    save_plan(plan, path)
    partial.unlink()
    return plan


def _export(source: Path, out: Path) -> Path:
    target = out / "pruned"
    if not (target / EXPORT_MARK).is_file():
        export_pruned_model(source, out / "plan.json", target)
    elif load_plan(target / PLAN_COPY) != load_plan(out / "plan.json"):
        raise ConfigError(
            f"{out / 'plan.json'}: was edited after pruned/ was made from it; "
            "remove pruned, healing, healed and slim.json there to go on with the new plan"
        )
    return target


def _heal(full: HybridLanguageModel, plan: PrunePlan, source: Path, out: Path, healing: RunConfig) -> Path:
    """Distil the pruned model from the full one in its own run folder; the last step becomes `healed/`."""
    target, run_dir = out / "healed", out / "healing"
    if (target / HEALED_MARK).is_file():
        return target
    system = healing.system.model_copy(update={"run_dir": str(run_dir)})
    result = train(healing.model_copy(update={"system": system}), model=apply_plan(full, plan), teacher=full)
    checkpoint = latest_checkpoint(run_dir)
    if result.interrupted or checkpoint is None:
        raise KeyboardInterrupt(f"healing stopped at step {result.step} and saved; start again to go on from there")
    with new_folder(target, HEALED_MARK, CheckpointError) as folder:
        load_model(checkpoint, dtype=full.dtype).save_pretrained(folder)
        copy_tokenizer_files(source, folder)
        figures = {
            "steps": result.step,
            "validation_loss_before": result.validation_loss_before,
            "validation_loss_after": result.validation_loss_after,
        }
        write_json(folder / HEALED_MARK, figures, CheckpointError)
    return target


def _measure(
    folders: Mapping[str, Path], evaluate: Evaluate, measure_speed: MeasureSpeed | None, device: str | torch.device
) -> list[SlimRow]:
    models = {name: load_model(folder, device=device) for name, folder in folders.items()}
    with torch.no_grad():
        losses = {name: float(evaluate(model)) for name, model in models.items()}
    speeds = {} if measure_speed is None else measure_speed(models)
    return [
        SlimRow(
            name=name,
            parameters=model.num_parameters(),
            bytes=sum(file.stat().st_size for file in weight_files(folders[name])),
            validation_loss=losses[name],
            prefill_tokens_per_second=speeds[name].prefill_tokens_per_second if speeds else None,
            decode_tokens_per_second=speeds[name].decode_tokens_per_second if speeds else None,
        )
        for name, model in models.items()
    ]
