"""What is measured of one trained model: loss with its error, bits per byte, loss by length, recall, stability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fusiontree.data import build_loader
from fusiontree.errors import CheckpointError, DataError
from fusiontree.eval.perplexity import IGNORED_LABEL, evaluation_mode, token_byte_lengths, token_losses
from fusiontree.eval.registry import find_tasks
from fusiontree.eval.run import evaluate
from fusiontree.eval.subject import Subject, learned_positions
from fusiontree.eval.task import TaskSettings
from fusiontree.lab.grid.config import MeasureSection
from fusiontree.lab.grid.statistics import gradient_spikes, of_windows
from fusiontree.models.json_files import read_json_lines
from fusiontree.train.config import RunConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEPTHS = (0.0, 50.0, 100.0)
NEW_TOKENS = 8  # of an answer about a needle: a number of six digits

Figures = dict[str, Any]


def measure_model(model: Any, tokenizer: Any, run: RunConfig, settings: MeasureSection) -> Figures:
    """Everything about a trained model but how fast it is; recall tasks keep their answers in the run folder."""
    return {
        "validation": validation(model, tokenizer, run, settings),
        "by_length": by_length(model, tokenizer, run, settings),
        "tasks": recall_tasks(model, tokenizer, run, settings),
        "training": training_figures(Path(run.system.run_dir)),
    }


def validation(model: Any, tokenizer: Any, run: RunConfig, settings: MeasureSection) -> Figures:
    """Loss on held-out rows of the training length, and the nats of each row, for errors and paired differences."""
    length, rows = run.training.sequence_length, run.training.micro_batch_size
    loader = build_loader(run.data, tokenizer, "validation", sequence_length=length, batch_size=rows)
    wanted = max(1, settings.validation_tokens // (length * rows))
    return _losses(model, islice(loader, wanted), run, _token_bytes(tokenizer))


def _token_bytes(tokenizer: Any) -> torch.Tensor | None:
    """Bytes of each token, None for a tokenizer whose tokens have no fixed number of them."""
    try:
        return token_byte_lengths(tokenizer)
    except DataError:
        return None


def _losses(
    model: Any, batches: Iterable[Mapping[str, Any]], run: RunConfig, table: torch.Tensor | None = None
) -> Figures:
    sums: list[float] = []
    counts: list[int] = []
    scored_bytes = 0
    device = next(model.parameters()).device
    dtype = AUTOCAST.get(run.training.precision)
    with evaluation_mode(model), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for batch in batches:
            losses, targets = token_losses(model, batch)
            scored = targets != IGNORED_LABEL
            sums += losses.double().sum(1).tolist()
            counts += scored.sum(1).tolist()
            if table is not None:
                scored_bytes += int(table[targets[scored].cpu()].sum())
    if not sum(counts):
        raise DataError("data.validation: no token to score in the held-out text")
    loss, error = of_windows(sums, counts)
    return {
        "loss": loss,
        "standard_error": error,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": math.fsum(sums) / math.log(2) / scored_bytes if scored_bytes else None,
        "tokens": sum(counts),
        "windows": {"nats": [round(value, 4) for value in sums], "tokens": counts},
    }


def by_length(model: Any, tokenizer: Any, run: RunConfig, settings: MeasureSection) -> dict[str, Figures]:
    """Multiple of the training length -> loss in rows of it, of one stretch of held-out text; why where there is none.

    `beyond`: share of the scored tokens that have more before them in their document than a training row is long.
    """
    length, multiples = run.training.sequence_length, sorted(set(settings.length_multiples))
    longest = length * max(multiples, default=1)
    tokens = -(-settings.length_tokens // longest) * longest
    limit = model.config.max_position_embeddings if learned_positions(model) else None
    found: dict[str, Figures] = {}
    for multiple in multiples:
        if limit is not None and multiple * length > limit:
            found[str(multiple)] = {"why": f"learned positions end at {limit}"}
            continue
        shape = {"sequence_length": multiple * length, "batch_size": 1, "longest": longest}
        loader = build_loader(run.data, tokenizer, "validation", **shape)
        batches = list(islice(loader, tokens // (multiple * length)))
        figures = _losses(model, batches, run)
        beyond = sum(int((batch["position_ids"] >= length).sum()) for batch in batches)
        seen = sum(batch["position_ids"].numel() for batch in batches)
        kept = ("loss", "standard_error", "tokens")
        found[str(multiple)] = {**{key: figures[key] for key in kept}, "beyond": beyond / seen}
    return found


def recall_tasks(model: Any, tokenizer: Any, run: RunConfig, settings: MeasureSection) -> dict[str, Figures]:
    """Task -> accuracy in percent and its error, or why there is none."""
    folder, length = Path(run.system.run_dir), run.training.sequence_length
    subject = Subject(model, tokenizer, batch_size=16, name=folder.parent.name)
    found: dict[str, Figures] = {}
    for name in settings.tasks:
        task = find_tasks(name)[0]
        outcome = evaluate(subject, [task], _task_settings(name, length, settings), folder / "eval" / name)
        if name in outcome.failed:
            found[name] = {"why": str(outcome.failed[name])}
            continue
        result = outcome.results[name]
        main = result["main_metric"]
        error = result["errors"].get(main)
        found[name] = {"accuracy": result["metrics"][main], "standard_error": error, "samples": result["samples"]}
    return found


def _task_settings(name: str, length: int, settings: MeasureSection) -> TaskSettings:
    if name == "recall":
        pairs = ",".join(str(pairs) for pairs in settings.recall_pairs)
        return TaskSettings(limit=settings.questions, options={"pairs": pairs})
    if name == "copy":
        sizes = ",".join(str(size) for size in settings.copy_sizes)
        return TaskSettings(limit=settings.questions, options={"sizes": sizes})
    repeats = -(-settings.questions // len(DEPTHS))
    options = {"repeats": str(repeats), "new_tokens": str(NEW_TOKENS), "buffer": "0"}
    return TaskSettings(lengths=(length,), depths=DEPTHS, options=options)


def training_figures(run_dir: Path) -> Figures:
    """How the training itself went, from its metrics: time, speed, spikes of loss and gradient."""
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl", CheckpointError) if "loss" in row]
    norms = [math.nan if row["grad_norm"] is None else float(row["grad_norm"]) for row in rows]
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "seconds": rows[-1]["elapsed"],
        "tokens_per_second": median(row["tokens_per_second"] for row in rows),
        "loss": rows[-1]["loss"],
        "loss_spikes": rows[-1]["spikes"],
        "gradient_spikes": gradient_spikes(norms),
        "gradient_norm": {"median": median(finite), "largest": max(finite)} if finite else None,
    }
