"""Gates of a model on text, as one JSON-able record. Shapes: N gated layers, B rows, L tokens, H channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.perplexity import MODEL_INPUTS, evaluation_mode
from fusiontree.models.gate_statistics import TOKEN_CLASSES, GateStatistics, token_class_table
from fusiontree.models.hybrid_model import HybridLanguageModel

BUCKETS = 64  # of positions at most
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class ReadText:
    """A text as the model reads it: ids, and the piece of text that each stands for ("" within a character)."""

    ids: list[int]
    pieces: list[str]

    def rows(self, length: int, most: int) -> list[Batch]:
        """The first ids in rows of this length, each read by itself; the last may be shorter."""
        begins = range(0, len(self.ids), length)[:most]
        return [{"input_ids": torch.tensor([self.ids[begin : begin + length]])} for begin in begins]


def read_text(tokenizer: Any, text: str) -> ReadText:
    """Ids of a text and their pieces, which together are the text where the tokenizer tells where its tokens lie."""
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return ReadText(ids, pieces_of(tokenizer, ids))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pieces, at = [], 0
    for _, end in found["offset_mapping"]:  # characters of several tokens are shown at the first of them
        pieces.append(text[at:end] if end > at else "")
        at = max(at, end)
    return ReadText(list(found["input_ids"]), pieces)


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each id decodes to by itself."""
    pieces: list[str] = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return pieces


def gated_layers(model: Any) -> list[int]:
    """Layers with a gate between two branches; ConfigError when there are none."""
    if not isinstance(model, HybridLanguageModel):
        raise ConfigError(f"gates: a {model.config.model_type} model has none; only FusionTree models have")
    specs = model.config.layer_specs
    found = [i for i, spec in enumerate(specs) if spec.block == "hybrid" and len(spec.mixers) == 2]
    if not found:
        raise ConfigError("gates: no layer of this model has two branches, so there is no gate to show")
    return found


def watch(model: Any, batches: Iterable[Batch], shown: ReadText, tokenizer: Any) -> dict[str, Any]:
    """The record: statistics over all batches, and the gates of the text shown token by token, read in one row.

    Raises ConfigError for a model without gates, DataError when there is no text.
    """
    layers = gated_layers(model)
    if not shown.ids:
        raise DataError("gates: there is no text to show")
    classes = token_class_table(tokenizer)
    statistics = GateStatistics(layers, model.config.hidden_size, model.device)
    places = _Places(len(layers), model.device)
    rows = 0
    with evaluation_mode(model):
        for batch in batches:
            _add(model, layers, batch, statistics, places, classes.to(model.device))
            rows += len(batch["input_ids"])
        if not rows:
            raise DataError("gates: there is no text to watch them on")
        tokens = _tokens(model, layers, shown, classes)
    edges, by_place = places.buckets()
    return {
        "rows": rows,
        "tokens": int(statistics.sums["tokens"].item()),
        "position_edges": edges,
        "class_tokens": dict(zip(TOKEN_CLASSES, map(int, statistics.sums["class_tokens"].tolist()), strict=True)),
        "layers": _layers(model, layers, statistics.rows(), by_place),
        "shown": tokens,
    }


def _gates(model: Any, layers: Sequence[int], batch: Batch) -> tuple[Tensor, Tensor]:
    """Gates (N, B, L, H) and branch rms (N, 2), fp32."""
    largest = int(batch["input_ids"].max())
    if largest >= model.config.vocab_size:
        raise DataError(f"gates: the tokenizer gives id {largest}, the model has {model.config.vocab_size} embeddings")
    inputs = {name: batch[name].to(model.device) for name in MODEL_INPUTS if name in batch}
    out = model(**inputs, output_gates=True, use_cache=False, logits_to_keep=1)
    return torch.stack([out.gates[i] for i in layers]).float(), torch.stack([out.branch_rms[i] for i in layers])


def _add(
    model: Any, layers: Sequence[int], batch: Batch, statistics: GateStatistics, places: _Places, classes: Tensor
) -> None:
    gates, rms = _gates(model, layers, batch)
    ids = batch["input_ids"].to(model.device)
    real = batch["attention_mask"].to(model.device) != 0 if "attention_mask" in batch else torch.ones_like(ids) != 0
    positions = batch.get("position_ids", torch.arange(ids.shape[1])).to(ids.device).expand(ids.shape)
    chosen = gates[:, real]  # (N, S, H)
    statistics.add(chosen, rms, classes[ids[real]])
    places.add(chosen.mean(-1), positions[real])


class _Places:
    """Sums of the mean gate by position in the document."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.sums = torch.zeros(layers + 1, 0, dtype=torch.float64, device=device)  # the last row counts

    def add(self, means: Tensor, positions: Tensor) -> None:
        """means (N, S) at positions (S,)."""
        longest = int(positions.max()) + 1
        if longest > self.sums.shape[1]:
            self.sums = torch.nn.functional.pad(self.sums, (0, longest - self.sums.shape[1]))
        self.sums.index_add_(1, positions, torch.cat([means, torch.ones_like(means[:1])]).double())

    def buckets(self) -> tuple[list[int], list[list[float | None]]]:
        """First positions of at most BUCKETS even stretches and the end, and per layer the mean gate in each."""
        length = self.sums.shape[1]
        width = -(-length // BUCKETS)
        edges = [*range(0, length, width), length]
        stretches = [self.sums[:, a:b].sum(1) for a, b in pairwise(edges)]
        table = torch.stack(stretches, dim=1).cpu()
        means = (table[:-1] / table[-1]).tolist()  # 0 / 0 is NaN: no token stood there
        return edges, [[None if value != value else round(value, 6) for value in row] for row in means]


def _tokens(model: Any, layers: Sequence[int], shown: ReadText, classes: Tensor) -> dict[str, Any]:
    """Per gated layer the mean and spread over channels of every token shown."""
    ids = torch.tensor([shown.ids])
    gates = _gates(model, layers, {"input_ids": ids})[0][:, 0]  # (N, L, H)
    return {
        "ids": shown.ids,
        "pieces": shown.pieces,
        "classes": [TOKEN_CLASSES[kind] for kind in classes[ids[0]].tolist()],
        "mean": _rounded(gates.mean(-1)),
        "std": _rounded(gates.std(-1, correction=0)),
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _layers(
    model: Any, gated: Sequence[int], rows: Sequence[dict[str, Any]], by_place: Sequence[Any]
) -> list[dict[str, Any]]:
    """Every layer of the model: what it has, and the statistics of its gate where it has one."""
    found = {layer: {**row, "position_mean": places} for layer, row, places in zip(gated, rows, by_place, strict=True)}
    return [
        {"layer": i, "block": spec.block, "mixers": list(spec.mixers), "gate": found.get(i)}
        for i, spec in enumerate(model.config.layer_specs)
    ]
