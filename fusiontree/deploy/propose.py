"""What the gates propose: a layer whose gate leans far to one side may not need the other branch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusiontree.deploy.plan import LayerPlan, PrunePlan, identity_of, other_branch
from fusiontree.deploy.savings import Saving, branch_savings
from fusiontree.errors import PlanError
from fusiontree.models.json_files import one_line, read_json_lines

KEEP_MAMBA_ABOVE = 0.8
KEEP_ATTENTION_BELOW = 0.2
MINIMUM_STEPS = 100
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class GateObservation:
    """Mean gate per layer (0 all attention … 1 all Mamba; layers without a gate are absent) over `steps` steps."""

    means: Mapping[int, float]
    steps: int


def read_gate_log(path: str | Path, window: int = 5) -> GateObservation:
    """Gate means from a run's `gates.jsonl`: the average of the last `window` records, observed up to the last step."""
    path = Path(path)
    records = read_json_lines(path, PlanError)
    if not records:
        raise PlanError(f"{path}: holds no gate record; train with the gate monitor on")
    try:
        means: dict[int, list[float]] = {}
        for record in records[-window:]:
            for entry in record["layers"]:
                if entry["mean"] is not None:
                    means.setdefault(int(entry["layer"]), []).append(float(entry["mean"]))
        averages = {layer: sum(values) / len(values) for layer, values in means.items()}
        return GateObservation(_checked(averages), int(records[-1]["step"]))
    except (KeyError, TypeError, ValueError) as problem:
        raise PlanError(f"{path}: not a gate log: {one_line(repr(problem))}") from None


@torch.no_grad()
def observe_gates(model: Any, batches: Iterable[Mapping[str, Any]]) -> GateObservation:
    """Gate means on the given batches (dicts with `input_ids` and, if any, `attention_mask`, `position_ids`)."""
    was_training = model.training
    model.eval()
    sums: dict[int, Any] = {}
    steps = 0
    try:
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in MODEL_INPUTS if key in batch}
            gates = model(**inputs, output_gates=True, use_cache=False, logits_to_keep=1).gates
            seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).float()
            for layer, gate in enumerate(gates):
                if gate is not None:
                    mean = (gate.float().mean(-1) * seen).sum() / seen.sum()
                    sums[layer] = sums.get(layer, 0.0) + mean
            steps += 1
    finally:
        model.train(was_training)
    if not steps:
        raise PlanError("there was no text to observe the gates on")
    return GateObservation(_checked({layer: float(value) / steps for layer, value in sums.items()}), steps)


def _checked(means: dict[int, float]) -> dict[int, float]:
    for layer, mean in means.items():
        if not (math.isfinite(mean) and -1e-6 <= mean <= 1 + 1e-6):
            raise ValueError(f"layer {layer} has a gate mean of {mean}; it must lie between 0 and 1")
    return {layer: min(1.0, max(0.0, mean)) for layer, mean in means.items()}


def propose_from_gates(
    model: Any,
    observation: GateObservation,
    *,
    minimum_steps: int = MINIMUM_STEPS,
    high: float = KEEP_MAMBA_ABOVE,
    low: float = KEEP_ATTENTION_BELOW,
) -> PrunePlan:
    """A plan from gate means alone: above `high` keep Mamba, below `low` keep attention, else both; not measured."""
    if not 0 <= low < high <= 1:
        raise PlanError(f"gate limits must satisfy 0 <= low < high <= 1; given low {low}, high {high}")
    savings = branch_savings(model)
    layers = []
    for index, layer in enumerate(model.config.layers):
        mean = observation.means.get(index)
        if len(layer["mixers"]) == 1:
            keep, why = layer["mixers"][0], "this layer has only this branch"
        elif mean is None:
            keep, why = "both", "no gate was observed"
        elif observation.steps < minimum_steps:
            keep, why = "both", f"gates observed for {observation.steps} steps; {minimum_steps} are needed to decide"
        else:
            keep, why = _by_mean(mean, low, high)
        saving = savings.get((index, other_branch(keep)), Saving(0, 0)) if keep != "both" else Saving(0, 0)
        layers.append(
            LayerPlan(
                layer=index,
                keep=keep,
                why=why,
                gate_mean=mean,
                bytes_saved=saving.bytes,
                flops_saved_per_token=saving.flops_per_token,
            )
        )
    return PrunePlan(model=identity_of(model), layers=layers)


def _by_mean(mean: float, low: float, high: float) -> tuple[str, str]:
    if mean > high:
        return "mamba", f"the mean gate {mean:.3f} is above {high}: the layer listens to Mamba (not measured)"
    if mean < low:
        return "attention", f"the mean gate {mean:.3f} is below {low}: the layer listens to attention (not measured)"
    return "both", f"the mean gate {mean:.3f} lies between {low} and {high}: both branches are heard"
