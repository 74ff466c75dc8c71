"""A plan within a quality budget: take out the cheapest branch, measure all removals together, go on while it fits."""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusiontree.deploy.measure import Evaluate, RemovalLoss, RemovalMeasurement, Removed, measure_each
from fusiontree.deploy.plan import Branch, Budget, LayerPlan, PrunePlan, identity_of, other_branch
from fusiontree.deploy.progress import ProgressFn, silent
from fusiontree.deploy.savings import Saving, branch_savings
from fusiontree.errors import PlanError

Candidate = tuple[int, Branch]


@dataclass
class _Choice:
    """What the search decided, with the joint measurements behind each decision."""

    joint_loss: float
    removed: dict[int, Branch] = field(default_factory=dict)
    others: dict[int, int] = field(default_factory=dict)  # layer → removals in other layers when its own was decided
    loss_after: dict[int, float] = field(default_factory=dict)  # layer → joint loss just after its removal
    refused: dict[Candidate, float] = field(default_factory=dict)  # candidate → joint loss it would have led to

    def take(self, layer: int, branch: Branch, joint: float) -> None:
        """Decide to take `branch` out of `layer`, in place of what was decided there before."""
        self.removed[layer] = branch
        self.others[layer] = len(self.removed) - 1
        self.loss_after[layer] = self.joint_loss = joint


def make_plan(
    model: Any,
    evaluate: Evaluate,
    *,
    max_loss_increase: float,
    saving: Literal["bytes", "flops"] = "bytes",
    proposal: PrunePlan | None = None,
    partial_path: str | Path | None = None,
    evaluation_id: str = "",
    on_progress: ProgressFn = silent,
) -> PrunePlan:
    """A plan whose measured joint loss stays within `max_loss_increase` of the whole model's.

    `saving` says what a loss increase is weighed against. `proposal` (from the gates) is recorded beside each decision,
    the measurement decides. One branch stays in every layer. `predicted_loss` is the last joint measurement.
    """
    if not (math.isfinite(max_loss_increase) and max_loss_increase >= 0):
        raise PlanError(f"max_loss_increase must be a finite number of at least 0; given {max_loss_increase}")
    loss = RemovalLoss(model, evaluate, partial_path, evaluation_id)
    singles = measure_each(loss, on_progress)
    savings = branch_savings(model)
    weights = {key: float(gain.bytes if saving == "bytes" else gain.flops_per_token) for key, gain in savings.items()}
    limit = singles.baseline_loss + max_loss_increase
    choice = choose(loss, singles, weights, limit, on_progress)
    trade_up(loss, choice, weights, limit, on_progress)
    return PrunePlan(
        model=identity_of(model),
        budget=Budget(max_loss_increase=max_loss_increase),
        baseline_loss=singles.baseline_loss,
        predicted_loss=choice.joint_loss,
        layers=[
            _layer_plan(model, index, singles, savings, choice, proposal) for index in range(len(model.config.layers))
        ],
    )


def choose(
    loss: Callable[[Removed], float],
    singles: RemovalMeasurement,
    weights: Mapping[Candidate, float],
    limit: float,
    on_progress: ProgressFn = silent,
) -> _Choice:
    """Lazy greedy search: effects do not add, so the cheapest candidate is measured with all removals so far.

    When that shows it to be dearer than the next one it goes back into the queue with its new cost. One that would lead
    above `limit` is refused for good. Removals that cost nothing come first, those that save most before the others.
    """
    choice = _Choice(singles.baseline_loss)
    fresh_at: dict[Candidate, int] = {}  # candidate → number of removals its queued cost was measured with
    queue = [(_cost(increase, weights[key]), key) for key, increase in singles.increases.items()]
    heapq.heapify(queue)
    done, expected = 1 + len(queue), 1 + 2 * len(queue)
    while queue:
        _, (layer, branch) = heapq.heappop(queue)
        if layer in choice.removed:
            continue
        joint = loss({**choice.removed, layer: branch})
        cost = _cost(joint - choice.joint_loss, weights[layer, branch])
        done += 1
        if joint > limit:
            choice.refused[layer, branch] = joint
            verdict = "too dear"
        elif queue and cost > queue[0][0] and fresh_at.get((layer, branch)) != len(choice.removed):
            fresh_at[layer, branch] = len(choice.removed)
            heapq.heappush(queue, (cost, (layer, branch)))
            verdict = "looks dearer now"
        else:
            choice.take(layer, branch, joint)
            verdict = "taken out"
        on_progress(done, max(done, expected), f"layer {layer} without {branch}: joint loss {joint:.4f}, {verdict}")
    on_progress(done, done, f"{len(choice.removed)} branches taken out")
    return choice


def _cost(increase: float, weight: float) -> tuple[float, float]:
    """Loss per unit saved; a removal that costs nothing is not ranked by how much better it makes a noisy loss."""
    return max(increase, 0.0) / max(weight, 1.0), -weight


def trade_up(
    loss: Callable[[Removed], float],
    choice: _Choice,
    weights: Mapping[Candidate, float],
    limit: float,
    on_progress: ProgressFn = silent,
) -> None:
    """Spend what is left of the budget: take the branch that saves more out of a layer instead of the one that went."""
    gains = {layer: weights[layer, other_branch(out)] - weights[layer, out] for layer, out in choice.removed.items()}
    layers = sorted((layer for layer, gain in gains.items() if gain > 0), key=lambda layer: -gains[layer])
    for done, layer in enumerate(layers, start=1):
        branch = other_branch(choice.removed[layer])
        joint = loss({**choice.removed, layer: branch})
        if joint <= limit:
            choice.take(layer, branch, joint)
        verdict = "traded" if joint <= limit else "too dear"
        on_progress(done, len(layers), f"layer {layer} without {branch} instead: joint loss {joint:.4f}, {verdict}")


def _layer_plan(
    model: Any,
    index: int,
    singles: RemovalMeasurement,
    savings: dict[Candidate, Saving],
    choice: _Choice,
    proposal: PrunePlan | None,
) -> LayerPlan:
    mixers = model.config.layers[index]["mixers"]
    proposed = next((entry for entry in proposal.layers if entry.layer == index), None) if proposal else None
    gate_mean = proposed.gate_mean if proposed else None
    if len(mixers) == 1:
        return LayerPlan(layer=index, keep=mixers[0], why="this layer has only this branch", gate_mean=gate_mean)
    removed = choice.removed.get(index)
    saving = savings[index, removed] if removed else Saving(0, 0)
    why = _why_removed(index, removed, singles, choice) if removed else _why_both(index, singles, choice)
    if proposed and gate_mean is not None:
        why += f"; the gates (mean {gate_mean:.3f}) propose to keep {proposed.keep}"
    return LayerPlan(
        layer=index,
        keep=other_branch(removed) if removed else "both",
        why=why,
        gate_mean=gate_mean,
        loss_increase={branch: value for (layer, branch), value in singles.increases.items() if layer == index},
        bytes_saved=saving.bytes,
        flops_saved_per_token=saving.flops_per_token,
    )


def _why_removed(index: int, branch: Branch, singles: RemovalMeasurement, choice: _Choice) -> str:
    alone = singles.increases[index, branch]
    joint = choice.loss_after[index] - singles.baseline_loss
    others = choice.others[index]
    return (
        f"measured: taking out {branch} alone changes the loss by {alone:+.4f}, "
        f"with {others} other removal{'s' * (others != 1)} in all by {joint:+.4f}"
    )


def _why_both(index: int, singles: RemovalMeasurement, choice: _Choice) -> str:
    parts = []
    for branch in ("mamba", "attention"):
        joint = choice.refused[index, branch] - singles.baseline_loss
        parts.append(f"without {branch} in all {joint:+.4f}")
    return "measured: " + ", ".join(parts) + ": over the budget"
