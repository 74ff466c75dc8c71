"""Loss on held-out text, always on the same batches, and probes: what else is measured while a run goes on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from fusiontree.train.losses import target_mask
from fusiontree.train.ranks import Ranks

Batch = dict[str, Any]
Probe = Callable[[Any], float | Mapping[str, float]]
"""Calls nothing but `model(**inputs)`, as often and with the same inputs in every process; no gradients, no dropout.
Gives a figure, or some by name."""


class HasLoss(Protocol):
    """What an evaluation gives back: at least its mean loss in nats per token."""

    @property
    def loss(self) -> float: ...


Evaluate = Callable[[Any, Iterable[Batch]], HasLoss]


@dataclass(frozen=True)
class MeanLoss:
    """Mean loss in nats per token, over this many tokens."""

    loss: float
    tokens: int


def mean_loss(model: Any, batches: Iterable[Batch]) -> MeanLoss:
    """Token-weighted mean of the model's own loss; the model is to be in evaluation mode, without gradients."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        count = int(target_mask(batch).sum())
        if count:
            total = total + model(**model_inputs(batch), skip_logits=True).loss.double() * count
            tokens += count
    return MeanLoss(float(total) / max(tokens, 1), tokens)


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; kept within what a float holds."""
    return math.exp(min(loss, 700.0))


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments for a batch; a cache would only cost memory."""
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    return {"use_cache": False, **{name: batch[name] for name in names if name in batch}}


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Tensors moved, everything else as it is."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}
    return {**batch, **moved}


class Validation:
    """Holds the validation batches and measures them; processes divide the batches."""

    def __init__(
        self,
        batches: Iterable[Batch],
        limit: int,
        evaluate: Evaluate | None,
        ranks: Ranks,
    ) -> None:
        self.batches = list(islice(batches, limit))
        self.evaluate = evaluate or mean_loss
        self.ranks = ranks

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """`validation_loss` and `validation_perplexity`; leaves the model in training mode."""
        model.eval()
        try:
            loss = self._loss(model)
            return {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
        finally:
            model.train()

    def _loss(self, model: Any) -> float:
        """Mean over the batches of all processes; each asks the model equally often, as a divided model needs."""
        ranks = self.ranks
        if ranks.world_size == 1:
            return self._ask(model, self.batches)
        own = self.batches[ranks.rank :: ranks.world_size]
        tokens = sum(int(target_mask(batch).sum()) for batch in own)
        loss = self._ask(model, own) if own else 0.0
        if len(own) * ranks.world_size < len(self.batches):
            self._ask(model, self.batches[:1])
        total = ranks.sum(torch.tensor([loss * tokens, tokens], dtype=torch.float64))
        return float(total[0] / total[1].clamp(min=1))

    def _ask(self, model: Any, batches: list[Batch]) -> float:
        return self.evaluate(model, (to_device(batch, self.ranks.device) for batch in batches)).loss


class Probes:
    """Measures its probes before the first step, every so many steps, and after the last, and leaves no trace: the
    model is in training mode again, and the random generators go on where they were."""

    def __init__(self, every: int | None, probes: Mapping[str, Probe] | None) -> None:
        self.every, self.probes = every, dict(probes or {})

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps`."""
        return self.every is not None and bool(self.probes) and (step in (0, steps) or step % self.every == 0)

    @torch.no_grad()
    def measure(self, model: Any, device: torch.device) -> dict[str, float]:
        """`name`, or `name/key` where a probe gives several figures."""

        def ask(**inputs: Any) -> Any:
            return model(**to_device(inputs, device))

        found: dict[str, float] = {}
        python = random.getstate()
        model.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                for name, probe in self.probes.items():
                    value = probe(ask)
                    figures = (
                        {f"{name}/{key}": one for key, one in value.items()}
                        if isinstance(value, Mapping)
                        else {name: value}
                    )
                    found.update({key: float(one) for key, one in figures.items()})
        finally:
            model.train()
            random.setstate(python)
        return found
