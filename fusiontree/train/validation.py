"""Loss on held-out text, always on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from fusiontree.train.losses import target_mask

Batch = dict[str, Any]
Probe = Callable[[Any], float]


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
            total = total + model(**model_inputs(batch)).loss.double() * count
            tokens += count
    return MeanLoss(float(total) / max(tokens, 1), tokens)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments for a batch; a cache would only cost memory."""
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    return {"use_cache": False, **{name: batch[name] for name in names if name in batch}}


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Tensors moved, everything else as it is."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items() if torch.is_tensor(value)}
    return {**batch, **moved}


class Validation:
    """Holds the validation batches and measures them, with any probes beside."""

    def __init__(
        self, batches: Iterable[Batch], limit: int, evaluate: Evaluate | None, probes: Mapping[str, Probe] | None
    ) -> None:
        self.batches = list(islice(batches, limit))
        self.evaluate = evaluate or mean_loss
        self.probes = dict(probes or {})

    @torch.no_grad()
    def measure(self, model: Any, device: torch.device) -> dict[str, float]:
        """`validation_loss`, `validation_perplexity` and one figure per probe; leaves the model in training mode."""
        model.eval()
        try:
            loss = self.evaluate(model, (to_device(batch, device) for batch in self.batches)).loss
            figures = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
            return {**figures, **{name: float(probe(model)) for name, probe in self.probes.items()}}
        finally:
            model.train()
