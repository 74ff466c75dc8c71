"""The probes of a training run, made from its settings: perplexity by length of context, and recall.

Text and tasks are made at the first call, when the run has its tokenizer and has read its text; later calls only ask
the model. `fusiontree.train` takes them as callables, for it knows nothing of how models are evaluated.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from fusiontree.data import Batch, build_loader, load_tokenizer
from fusiontree.eval.recall import RecallProbe
from fusiontree.train.config import RunConfig
from fusiontree.train.validation import Probe, mean_loss, perplexity


def training_probes(config: RunConfig) -> dict[str, Probe]:
    """The probes that `config` asks for, by the name that their figures get."""
    if config.probes.every is None:
        return {}
    probes: dict[str, Probe] = {}
    if config.probes.lengths(config.training.sequence_length):
        probes["perplexity"] = PerplexityProbe(config)
    if config.probes.recall_pairs:
        probes["recall"] = RunRecall(config)
    return probes


def run_tokenizer(config: RunConfig) -> Any:
    """The tokenizer that the run keeps in its folder from the start."""
    return load_tokenizer(Path(config.system.run_dir) / "tokenizer")


class PerplexityProbe:
    """Perplexity by length of context, over one stretch of held-out text cut into rows of each length.

    Longer rows leave fewer tokens with little before them, so it falls with the length where context is used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __call__(self, model: Any) -> dict[str, float]:
        """`{"256": perplexity in rows of 256 tokens, …}`."""
        return {str(length): perplexity(mean_loss(model, batches).loss) for length, batches in self._text.items()}

    @cached_property
    def _text(self) -> dict[int, list[dict[str, Any]]]:
        config = self.config
        lengths = config.probes.lengths(config.training.sequence_length)
        # Packed whatever the run does, for only then are rows of one length parts of rows of another.
        data = config.data.model_copy(update={"packing": True, "num_workers": 0})
        tokens = -(-config.probes.perplexity_tokens // lengths[-1]) * lengths[-1]
        at_once = max(config.training.micro_batch_size * config.training.sequence_length, lengths[-1])
        found = {}
        for length in lengths:
            shape = {"sequence_length": length, "batch_size": tokens // length, "longest": lengths[-1]}
            batch = next(iter(build_loader(data, run_tokenizer(config), "validation", **shape)))
            found[length] = _cut(batch, at_once // length)
        return found


def _cut(batch: Batch, rows: int) -> list[dict[str, Any]]:
    """A batch as several of at most `rows` rows."""
    names = ("input_ids", "labels", "position_ids")
    pieces = [batch[name].split(rows) for name in names]  # type: ignore[literal-required]
    return [dict(zip(names, piece, strict=True)) for piece in zip(*pieces, strict=True)]


class RunRecall:
    """Recall in the tokens of the run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __call__(self, model: Any) -> dict[str, float]:
        """`{"4": share of values found among 4 pairs, …}`."""
        return self._probe(model)

    @cached_property
    def _probe(self) -> RecallProbe:
        settings = self.config.probes
        return RecallProbe(run_tokenizer(self.config), settings.recall_pairs, settings.recall_questions)
