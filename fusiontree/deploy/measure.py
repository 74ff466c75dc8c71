"""What a branch is worth, measured: the loss when it is really taken out. Every measurement is kept on disk."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusiontree.deploy.files import write_text
from fusiontree.deploy.fingerprint import model_fingerprint
from fusiontree.deploy.plan import BRANCHES, Branch
from fusiontree.deploy.progress import ProgressFn, silent
from fusiontree.errors import PlanError
from fusiontree.models.json_files import one_line, read_json_lines

Evaluate = Callable[[Any], float]
"""Model → mean loss (nats per token) on held-out text; must give the same number for the same model."""

Removed = Mapping[int, Branch]


class RemovalLoss:
    """The loss without given branches, measured once each; with `partial_path` a restart goes on where it was.

    `evaluation_id` names the held-out text, so that measurements on other text are never mixed in.
    """

    def __init__(self, model: Any, evaluate: Evaluate, partial_path: str | Path | None = None, evaluation_id: str = ""):
        self.model = model
        self.evaluate = evaluate
        self.path = None if partial_path is None else Path(partial_path)
        self.known: dict[str, float] = {}
        if self.path is not None:
            self._open(
                self.path,
                {
                    "format": "fusiontree-removal-losses",
                    "version": 1,
                    "fingerprint": model_fingerprint(model),
                    "evaluation_id": evaluation_id,
                },
            )

    def __call__(self, removed: Removed) -> float:
        """Loss with `removed` (layer → branch) masked together."""
        key = _key(removed)
        if key not in self.known:
            loss = self._measure(removed)
            if self.path is not None:
                _append(self.path, {"removed": json.loads(key), "loss": loss})
            self.known[key] = loss
        return self.known[key]

    def _measure(self, removed: Removed) -> float:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.model.branches_removed(dict(removed)):
                loss = float(self.evaluate(self.model))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._how_to_go_on()) from None
        finally:
            self.model.train(was_training)
        if not math.isfinite(loss):
            raise PlanError(f"the loss without {_words(removed)} is {loss}; it must be a finite number")
        return loss

    def _how_to_go_on(self) -> str:
        if self.path is None:
            return "interrupted while measuring; nothing was kept"
        return f"interrupted; {len(self.known)} measurements are kept in {self.path}: start again to go on from there"

    def _open(self, path: Path, header: dict[str, Any]) -> None:
        if not path.exists():
            write_text(path, json.dumps(header) + "\n", PlanError)
            return
        lines = read_json_lines(path, PlanError)
        if not lines or lines[0] != header:
            raise PlanError(f"{path}: holds measurements of another model or other text; remove it to measure anew")
        try:
            for line in lines[1:]:
                self.known[_key({int(layer): branch for layer, branch in line["removed"].items()})] = float(
                    line["loss"]
                )
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise PlanError(f"{path}: not a record of measurements: {one_line(repr(problem))}") from None
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines), PlanError)  # drops a line cut by a kill


def _key(removed: Removed) -> str:
    return json.dumps({str(layer): removed[layer] for layer in sorted(removed)})


def _words(removed: Removed) -> str:
    return ", ".join(f"{branch} of layer {layer}" for layer, branch in sorted(removed.items())) or "any removal"


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise PlanError(f"{path}: cannot be written: {one_line(problem)}") from None


@dataclass(frozen=True)
class RemovalMeasurement:
    """The loss of the whole model, and how much it rises when one branch alone is taken out."""

    baseline_loss: float
    increases: dict[tuple[int, Branch], float]


def removable_branches(model: Any) -> list[tuple[int, Branch]]:
    """Every (layer, branch) that has a neighbour in its layer."""
    layers = enumerate(model.config.layers)
    return [(index, branch) for index, layer in layers if len(layer["mixers"]) > 1 for branch in BRANCHES]


def measure_removal(
    model: Any,
    evaluate: Evaluate,
    *,
    partial_path: str | Path | None = None,
    evaluation_id: str = "",
    on_progress: ProgressFn = silent,
) -> RemovalMeasurement:
    """Take out each branch of each layer alone and measure the loss; 1 + 2 × layers evaluations."""
    return measure_each(RemovalLoss(model, evaluate, partial_path, evaluation_id), on_progress)


def measure_each(loss: RemovalLoss, on_progress: ProgressFn = silent) -> RemovalMeasurement:
    """`measure_removal` on losses that are kept."""
    candidates = removable_branches(loss.model)
    baseline = loss({})
    on_progress(1, 1 + len(candidates), f"the whole model: loss {baseline:.4f}")
    increases: dict[tuple[int, Branch], float] = {}
    for done, (layer, branch) in enumerate(candidates, start=2):
        increases[layer, branch] = loss({layer: branch}) - baseline
        on_progress(done, 1 + len(candidates), f"layer {layer} without {branch}: {increases[layer, branch]:+.4f}")
    return RemovalMeasurement(baseline, increases)
