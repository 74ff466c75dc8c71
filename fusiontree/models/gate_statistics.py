"""Running statistics of the fusion gates, kept on the device: nothing here waits for it except `GateStatistics.rows`;
and the classes of tokens that they are told apart by.

N layers, S sampled tokens, H channels, C token classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TOKEN_CLASSES = ("space", "word", "number", "punctuation")
BINS = 20  # bins of the reported histogram
FINE = 200  # bins kept, from which percentiles are read (resolution 0.005)
SHOWN_CHANNELS = 64
PERCENTILES = (5, 25, 50, 75, 95)


class GateStatistics:
    """Sums over the sampled gates of the given layers; `decay` fades them."""

    def __init__(self, layers: Sequence[int], hidden_size: int, device: torch.device) -> None:
        self.layers = list(layers)
        n, classes = len(self.layers), len(TOKEN_CLASSES)
        shapes: dict[str, tuple[int, ...]] = {
            "histogram": (n, FINE),
            "moments": (n, 3),  # sums of g, of g^2, of the binary entropy in nats
            "channels": (n, hidden_size),
            "rms": (n, 2),
            "classes": (n, classes),
            "class_tokens": (classes,),
            "tokens": (1,),
            "looks": (1,),
        }
        self.sums = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self.low, self.high = torch.ones(n, device=device), torch.zeros(n, device=device)

    @torch.no_grad()
    def add(self, gates: Tensor, rms: Tensor, classes: Tensor | None) -> None:
        """Take in gates (N, S, H), branch rms (N, 2) and the class of each token (S,), a number below C."""
        n, tokens, _ = gates.shape
        sums = self.sums
        sums["histogram"] += _count(gates, n)
        p = gates.clamp(1e-6, 1 - 1e-6)
        entropy = -(p * p.log() + (1 - p) * torch.log1p(-p))
        sums["moments"] += torch.stack([gates.sum((1, 2)), gates.square().sum((1, 2)), entropy.sum((1, 2))], dim=1)
        sums["channels"] += gates.sum(1)
        sums["rms"] += rms
        sums["tokens"] += tokens
        sums["looks"] += 1
        self.low = torch.minimum(self.low, gates.amin((1, 2)))
        self.high = torch.maximum(self.high, gates.amax((1, 2)))
        if classes is not None:
            member = torch.nn.functional.one_hot(classes, len(TOKEN_CLASSES)).float()  # (S, C)
            sums["classes"] += gates.mean(2) @ member
            sums["class_tokens"] += member.sum(0)

    def fade(self, decay: float) -> None:
        """Let earlier observations count `decay` times as much; the extremes start again."""
        for value in self.sums.values():
            value.mul_(decay)
        self.low.fill_(1.0)
        self.high.fill_(0.0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on, by name."""
        return {**self.sums, "low": self.low, "high": self.high}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able dict per layer, as in gates.jsonl; empty before the first observation. One device sync."""
        values = {name: tensor.double() for name, tensor in _to_host(self.tensors()).items()}
        if values["tokens"].item() == 0:
            return []
        return [self._row(index, layer, values) for index, layer in enumerate(self.layers)]

    def _row(self, index: int, layer: int, values: dict[str, Tensor]) -> dict[str, Any]:
        histogram, channels = values["histogram"][index], values["channels"][index]
        count = values["tokens"].item() * channels.numel()
        total, squares, entropy = (values["moments"][index] / count).tolist()
        mamba_rms, attention_rms = (values["rms"][index] / values["looks"]).tolist()
        row = {
            "layer": layer,
            "mean": total,
            "std": math.sqrt(max(squares - total**2, 0.0)),
            "min": values["low"][index].item(),
            "max": values["high"][index].item(),
            **{f"p{q:02d}": value for q, value in zip(PERCENTILES, _percentiles(histogram), strict=True)},
            "entropy": entropy,
            "mamba_rms": mamba_rms,
            "attention_rms": attention_rms,
            "histogram": histogram.view(BINS, -1).sum(1).round().long().tolist(),
            "channel_mean": _pool(channels / values["tokens"]),
        }
        seen = values["class_tokens"].tolist()
        if any(seen):
            sums = values["classes"][index].tolist()
            row["classes"] = {name: s / n if n else None for name, s, n in zip(TOKEN_CLASSES, sums, seen, strict=True)}
        return _rounded(row)


def token_class_table(tokenizer: Any) -> Tensor:
    """(V,) int64: the class of every token id, an index into TOKEN_CLASSES, by the text it decodes to."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return torch.tensor([TOKEN_CLASSES.index(_class_of(text)) for text in texts])


def _class_of(text: str) -> str:
    core = text.strip()
    if not core:
        return "space"
    if any(character.isalpha() for character in core):
        return "word"
    return "number" if any(character.isdigit() for character in core) else "punctuation"


def _count(gates: Tensor, n: int) -> Tensor:
    """(N, S, H) -> counts (N, FINE)."""
    bins = (gates * FINE).long().clamp_(0, FINE - 1)
    bins += torch.arange(n, device=gates.device).view(n, 1, 1) * FINE
    flat = bins.flatten()
    if flat.device.type == "cpu":  # ten times faster than scatter_add_ here, but on a GPU bincount waits for the device
        return torch.bincount(flat, minlength=n * FINE).view(n, FINE).float()
    zeros = torch.zeros(n * FINE, device=flat.device)
    return zeros.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32)).view(n, FINE)


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors in one copy, so in one wait."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def _percentiles(histogram: Tensor) -> list[float]:
    """Percentiles read from the fine histogram, linear inside a bin."""
    cumulative = histogram.cumsum(0)
    wanted = torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * cumulative[-1]
    index = torch.searchsorted(cumulative, wanted).clamp(max=FINE - 1)
    inside = (wanted - (cumulative[index] - histogram[index])) / histogram[index].clamp(min=1e-12)
    return ((index + inside.clamp(0, 1)) / FINE).tolist()


def _pool(channels: Tensor) -> list[float]:
    """At most SHOWN_CHANNELS means of neighbouring channels."""
    size = min(SHOWN_CHANNELS, channels.numel())
    return torch.nn.functional.adaptive_avg_pool1d(channels.view(1, 1, -1), size).flatten().tolist()


def _rounded(value: Any) -> Any:
    """Floats to six figures, so that a line stays readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
