"""GateMonitor: watches the fusion gates while training, writes gates.jsonl, and raises alarms with advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusiontree.models.gate_statistics import GateStatistics, token_class_table
from fusiontree.train.callbacks import Callback, Snapshot
from fusiontree.train.config import GateMonitorSection
from fusiontree.train.jsonl import JsonLines


class GateMonitor(Callback):
    """Samples the gates every `sample_every` steps without waiting for the device; reports every `every` steps."""

    name = "gate_monitor"

    def __init__(self, settings: GateMonitorSection, steps: int, file: JsonLines, tokenizer: Any | None = None) -> None:
        self.settings = settings
        self.steps = steps
        self.file = file
        self.classes = token_class_table(tokenizer) if tokenizer is not None and settings.token_classes else None
        self.statistics: GateStatistics | None = None
        self.alarms: list[dict[str, Any]] = []
        self._saved: dict[str, Tensor] = {}

    def wants_gates(self, step: int) -> bool:
        """Whether the forward passes of this step must hand out their gates."""
        return step % self.settings.sample_every == 0 or step % self.settings.every == 0

    @torch.no_grad()
    def on_forward(self, step: int, batch: Mapping[str, Any], out: Any) -> None:
        """Add one forward pass to the running statistics."""
        layers = [i for i, gate in enumerate(out.gates or ()) if gate is not None]
        if not layers or not self.wants_gates(step):
            return
        if self.statistics is None:
            self._start(layers, out.gates[layers[0]])
        chosen = self._sample(step, batch)
        gates = torch.stack([out.gates[i].flatten(0, 1)[chosen] for i in layers]).float()
        rms = torch.stack([out.branch_rms[i] for i in layers])
        classes = None
        if self.classes is not None:
            classes = self.classes[batch["input_ids"].flatten()[chosen]]
        assert self.statistics is not None
        self.statistics.add(gates, rms, classes)

    def _start(self, layers: list[int], gate: Tensor) -> None:
        self.statistics = GateStatistics(layers, gate.shape[-1], gate.device)
        if self.classes is not None:
            self.classes = self.classes.to(gate.device)
        if self._saved:
            self.statistics.load_tensors(self._saved)
            self._saved = {}

    def _sample(self, step: int, batch: Mapping[str, Any]) -> Tensor:
        """Indices of tokens spread evenly over the batch; where they start moves with the step."""
        ids = batch["input_ids"]
        total, mask = ids.numel(), batch.get("attention_mask")
        count = min(self.settings.sample_tokens, total)
        stride = total // count
        chosen = torch.arange(count, device=ids.device) * stride + step % stride
        return chosen if mask is None else _prefer_real(chosen, mask.flatten())

    def on_step(self, run: Snapshot) -> None:
        """Write a line and look for alarms when it is time."""
        if self.statistics is None or run.step % self.settings.every != 0:
            return
        rows = self.statistics.rows()
        self.statistics.fade(self.settings.decay)
        if not rows:
            return
        alarms = self._alarms(rows) if run.step >= self.settings.alarm_after * self.steps else []
        known = {(alarm["layer"], alarm["kind"]) for alarm in self.alarms}
        for alarm in alarms:
            if (alarm["layer"], alarm["kind"]) not in known:
                run.say(f"gate alarm at step {run.step}: {alarm['message']}. {alarm['advice']}")
        self.alarms = alarms
        self.file.write({"step": run.step, "layers": rows, "alarms": alarms})

    def _alarms(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = (alarm for row in rows for alarm in (self._gate_alarm(row), self._branch_alarm(row)))
        return [alarm for alarm in found if alarm is not None]

    def _gate_alarm(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        settings, layer, mean = self.settings, row["layer"], row["mean"]
        if abs(mean - 0.5) < settings.stuck_width and row["std"] < settings.stuck_width:
            return {
                "layer": layer,
                "kind": "stuck",
                "message": f"layer {layer}: gates have not left 0.5 (mean {mean:.3f}, std {row['std']:.3f})",
                "advice": "Raise training.lr, lower training.loss.entropy_weight, or let the balance phase end earlier "
                "(training.loss.specialise_after)",
            }
        end = "attention" if mean < 0.5 else "Mamba"
        if min(mean, 1 - mean) < settings.collapse_margin:
            return {
                "layer": layer,
                "kind": "collapsed",
                "message": f"layer {layer}: gates collapsed to {end} (mean {mean:.3f})",
                "advice": "Early: raise training.loss.balance_weight or training.warmup_steps. Late: prune the branch",
            }
        return None

    def _branch_alarm(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        layer, rms = row["layer"], {"mamba": row["mamba_rms"], "attention": row["attention_rms"]}
        quiet, loud = sorted(rms, key=lambda branch: rms[branch])
        if rms[quiet] >= self.settings.silent_ratio * rms[loud]:
            return None
        return {
            "layer": layer,
            "kind": "silent",
            "message": f"layer {layer}: the {quiet} branch is silent (rms {rms[quiet]:.2e} beside {rms[loud]:.2e})",
            "advice": "Lower training.weight_decay or training.lr, use model.drop_branch_prob, or prune the branch",
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Running sums, for the checkpoint."""
        return self._saved if self.statistics is None else self.statistics.tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Taken over at the next look, when the layers are known."""
        self._saved = tensors

    def state_dict(self) -> dict[str, Any]:
        """Alarms that have been told already."""
        return {"alarms": self.alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.alarms = list(state["alarms"])


def _prefer_real(chosen: Tensor, mask: Tensor) -> Tensor:
    """Replace padding by the sample's nearest earlier real token (or its first), without waiting for the device."""
    order = torch.arange(chosen.numel(), device=chosen.device)
    real = mask[chosen].bool()
    last = torch.where(real, order, order.new_full((), -1)).cummax(0).values
    first = torch.where(real, order, order.new_full((), chosen.numel() - 1)).amin()
    return chosen[torch.where(last < 0, first, last)]
