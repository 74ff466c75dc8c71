"""Reads what a training run left behind. Everything may be missing or damaged: each gap becomes a note, not a crash."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusiontree.deploy.export import EXPORT_MARK
from fusiontree.deploy.plan import MAX_LAYERS, PrunePlan, load_plan
from fusiontree.errors import DataError, PlanError

Row = dict[str, Any]
PROBES = ("perplexity/", "recall/")  # how the names of their figures begin


@dataclass
class RunFolder:
    """The parts of a run that a report shows; `notes` says in plain words what is damaged."""

    path: Path
    training: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    probes: list[Row] = field(default_factory=list)
    spikes: list[Row] = field(default_factory=list)
    gates: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    state: Row = field(default_factory=dict)  # how the run ended, in its own words
    model: Row = field(default_factory=dict)
    model_folder: Path | None = None  # the newest checkpoint with a readable config.json, which `model` is from
    plan: PrunePlan | None = None
    slim: list[Row] = field(default_factory=list)
    healing: list[Row] = field(default_factory=list)  # training lines of the short distillation after pruning
    export: Row = field(default_factory=dict)  # what the export recorded about itself
    samples: list[Row] = field(default_factory=list)
    config_text: str = ""
    notes: list[str] = field(default_factory=list)


def read_run(run_dir: str | Path) -> RunFolder:
    """Read a run folder. Raises DataError when it is not a folder."""
    path = Path(run_dir)
    if not path.is_dir():
        raise DataError(f"report: {path} is not a folder; give the run folder that training wrote")
    run = RunFolder(path)
    metrics = _read_lines(run, "metrics.jsonl")
    run.training = _by_step([row for row in metrics if "loss" in row])
    run.validation = _by_step([row for row in metrics if "validation_loss" in row])
    run.probes = _by_step([row for row in metrics if any(key.startswith(PROBES) for key in row)])
    run.spikes = _by_step(_read_lines(run, "spikes.jsonl"))
    run.gates = _by_step(_gate_records(_read_lines(run, "gates.jsonl")))
    run.summary = _read_object(run, "summary.json")
    run.state = _read_object(run, "state.json")
    run.plan = _read_plan(run)
    run.slim = _rows(_read_json(run, "slim.json"), "rows")
    run.healing = _by_step([row for row in _read_lines(run, "healing/metrics.jsonl") if "loss" in row])
    run.export = _read_object(run, f"pruned/{EXPORT_MARK}")
    run.samples = _rows(_read_json(run, "samples.json"), "samples")
    run.config_text = _read_text(run, "config.yaml") or ""
    run.model = _model_config(run)
    return run


def number(row: Row, key: str) -> float:
    """The finite number under `key`, NaN for anything else."""
    value = row.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan  # type: ignore[arg-type]


def series(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key`, both (n,)."""
    pairs = [(number(row, "step"), number(row, key)) for row in rows]
    kept = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=float).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def probe_series(rows: list[Row], probe: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Number in the figure's name (a length, a number of pairs) -> steps and values, smallest number first."""
    names = {key for row in rows for key in row if key.startswith(f"{probe}/")}
    numbers = sorted(int(name) for key in names if (name := key.rpartition("/")[2]).isdecimal())
    found = {value: series(rows, f"{probe}/{value}") for value in numbers}
    return {value: pair for value, pair in found.items() if len(pair[0])}


def alarms(gates: list[Row]) -> list[Row]:
    """One row per layer and kind, newest wording, with `first_step`, `last_step` and `times`."""
    found: dict[tuple[str, str], Row] = {}
    for record in gates:
        entries = record.get("alarms")
        for alarm in entries if isinstance(entries, list) else []:
            if not isinstance(alarm, dict):
                continue
            key = (str(alarm.get("layer")), str(alarm.get("kind")))
            old = found.get(key, {"first_step": record["step"], "times": 0})
            seen = {"first_step": old["first_step"], "last_step": record["step"], "times": old["times"] + 1}
            found[key] = alarm | seen
    return list(found.values())


def _by_step(rows: list[Row]) -> list[Row]:
    """Sorted by step, the later of two lines about one step: a resumed run repeats steps after its checkpoint."""
    latest = {row["step"]: row for row in rows if math.isfinite(number(row, "step"))}
    return [latest[step] for step in sorted(latest)]


def _read_text(run: RunFolder, name: str) -> str | None:
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
        return None


def _read_lines(run: RunFolder, name: str) -> list[Row]:
    rows, damaged = [], 0
    for line in (_read_text(run, name) or "").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        run.notes.append(f"{name}: {damaged} unreadable line{'s' * (damaged > 1)} left out")
    return rows


def _read_json(run: RunFolder, name: str) -> Any:
    text = _read_text(run, name)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        run.notes.append(f"{name} is damaged and left out")
        return None


def _read_object(run: RunFolder, name: str) -> Row:
    value = _read_json(run, name)
    return value if isinstance(value, dict) else {}


def _gate_records(rows: list[Row]) -> list[Row]:
    """Only records with at least one layer entry that says which layer it is."""
    records = []
    for row in rows:
        entries = row["layers"] if isinstance(row.get("layers"), list) else []
        kept = [entry for entry in entries if isinstance(entry, dict) and 0 <= number(entry, "layer") < MAX_LAYERS]
        if kept:
            records.append(row | {"layers": kept})
    return records


def _read_plan(run: RunFolder) -> PrunePlan | None:
    path = run.path / "plan.json"
    if not path.exists():
        return None
    try:
        return load_plan(path)
    except PlanError as error:
        run.notes.append(f"plan.json is left out: {error}")
        return None


def _rows(value: Any, key: str) -> list[Row]:
    items = value.get(key) if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _model_config(run: RunFolder) -> Row:
    """config.json of the newest checkpoint; before the first one, the model section of config.yaml."""
    for folder in sorted(run.path.glob("checkpoints/step-*[0-9]"), reverse=True):
        found = _read_object(run, str(folder.relative_to(run.path) / "config.json"))
        if found:
            run.model_folder = folder
            return found
    try:
        config = yaml.safe_load(run.config_text) or {}
    except yaml.YAMLError:
        run.notes.append("config.yaml is damaged and left out")
        return {}
    section = config.get("model") if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}
