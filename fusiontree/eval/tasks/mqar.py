"""Multi-query associative recall (MQAR) of Zoology (Arora, Eyuboglu and others 2023, arXiv:2312.04927).

Keys with their values, then some of the keys again, each asking for its value; with 2 pairs in 16 tokens:

    inputs  2 8 4 7 0 0 4 0 0 0 0 0 2 0 0 0      4 was told 7, and 2 was told 8
    labels  . . . . . . 7 . . . . . 8 . . .      -100 (here a dot) where nothing is asked

Shapes: R rows, L tokens, V vocabulary. Ids are drawn from the whole vocabulary, so that only a model trained on this
task can do it. The task `recall` is its form for any language model: pairs of words, as in the probe while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusiontree.errors import ConfigError
from fusiontree.eval.perplexity import IGNORED_LABEL
from fusiontree.eval.recall import recall_accuracy, recall_rows, word_tokens
from fusiontree.eval.registry import Family
from fusiontree.eval.results import mean_and_error
from fusiontree.eval.task import Progress, TaskSettings
from fusiontree.eval.tasks.options import one_of, whole_number, whole_numbers

if TYPE_CHECKING:
    from fusiontree.eval.subject import Subject

VOCABULARY, POWER = 8192, 0.01
PAIRS, QUESTIONS = (4, 8, 16, 32, 64, 128), 512
MAX_LOGITS = 1 << 24  # standing in memory at once: 64 MB in fp32
Case = tuple[int, int]  # length, pairs
# The published test sets: ICLR 2024, figure 2, and Based (arXiv:2402.18668); and rows per case.
SUITES: dict[str, tuple[tuple[Case, ...], int]] = {
    "zoology": (((64, 4), (128, 8), (256, 16), (512, 64)), 3000),
    "based": (((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)), 1000),
}


def mqar_rows(
    rows: int, length: int, pairs: int, vocabulary: int, random: np.random.RandomState, *,
    power: float = POWER, filler: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Inputs and labels (R, L), the labels already shifted: the value stands at the place of its query.

    Keys are 1 … V/2-1, values V/2 … V-1, drawn without repetition. The query of a pair stands at 2 * pairs + 2 * gap,
    where gaps are drawn without repetition, P(g) ~ (g+1)^(power-1). `filler`: random ids and not 0 where nothing else
    stands. All draws come from `random` in the order of the reference, so that RandomState(seed) gives its rows; NumPy
    keeps the stream of RandomState for ever. Raises ConfigError for sizes that cannot be.
    """
    _check_sizes(length, pairs, vocabulary)
    context, middle = 2 * pairs, vocabulary // 2
    keys = 1 + np.stack([random.choice(middle - 1, pairs, replace=False) for _ in range(rows)])
    values = middle + np.stack([random.choice(vocabulary - middle, pairs, replace=False) for _ in range(rows)])
    space = (length - context) // 2
    weights = np.arange(1, space + 1) ** (power - 1.0)
    chance = weights / weights.sum()
    gaps = np.stack([random.choice(space, pairs, replace=False, p=chance) for _ in range(rows)])

    inputs = np.zeros((rows, length), dtype=np.int64)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    labels = np.full((rows, length), IGNORED_LABEL, dtype=np.int64)
    places = context + 2 * gaps
    np.put_along_axis(inputs, places, keys, axis=1)
    np.put_along_axis(labels, places, values, axis=1)
    if filler:
        inputs = np.where(inputs == 0, random.randint(vocabulary, size=inputs.shape), inputs)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def _check_sizes(length: int, pairs: int, vocabulary: int) -> None:
    if length % 2 or vocabulary % 2 or vocabulary <= length or pairs < 1 or 4 * pairs > length:
        raise ConfigError(
            f"mqar: length {length}, pairs {pairs}, vocabulary {vocabulary}: needs an even length, an even vocabulary "
            "larger than it and 1 to length/4 pairs"
        )


def mqar_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled places (R,) of each row whose label is the arg-max of the logits (R, L, V)."""
    asked = labels != IGNORED_LABEL
    right = (logits.argmax(-1).to(labels.device) == labels) & asked
    return right.sum(1) / asked.sum(1)


class MqarTask:
    """Accuracy in percent over the labelled places of a row, then over the rows, then over lengths and pairs."""

    name, version, main_metric = "mqar", 1, "accuracy"

    def measure(self, subject: Subject, settings: TaskSettings, progress: Progress) -> dict[str, Any]:
        """Raises ConfigError when the model's vocabulary or length is too small."""
        vocabulary = whole_number(settings, "vocabulary", VOCABULARY, least=4)
        suite, rows = SUITES[one_of(settings, "suite", tuple(SUITES))]
        cases = [case for case in suite if not settings.lengths or case[0] in settings.lengths]
        _check_fit(subject, cases, suite, vocabulary)
        limit = len(cases) * rows if settings.limit is None else settings.limit
        table, samples, means = [], [], []
        for done, (length, pairs) in enumerate(cases[:limit]):
            progress(done, len(cases))
            count = min(rows, len(range(done, limit, len(cases))))  # a limit is divided among the cases
            inputs, labels = mqar_rows(count, length, pairs, vocabulary, np.random.RandomState(settings.seed))
            shares = progress.once(f"{length}x{pairs}", partial(_shares, subject, inputs, labels))
            percent = [100 * share for share in shares]
            means.append(fmean(percent))
            error = mean_and_error(percent)["standard_error"]
            table.append({"length": length, "pairs": pairs, "accuracy": means[-1], "error": error, "rows": count})
            samples += [{"id": f"{length}x{pairs}/{row}", "accuracy": share} for row, share in enumerate(shares)]
        progress(len(cases), len(cases))
        return {"metrics": {"accuracy": fmean(means)}, "tables": {"by_case": table}, "samples": samples}


def _shares(subject: Subject, inputs: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each row, a few rows at a time."""
    size = max(1, MAX_LOGITS // (inputs.shape[1] * subject.vocab_size))
    parts = zip(inputs.split(size), labels.split(size), strict=True)
    return torch.cat([mqar_accuracy(subject.logits(some), wanted) for some, wanted in parts]).tolist()


def _check_fit(subject: Subject, cases: Sequence[Case], suite: Sequence[Case], vocabulary: int) -> None:
    if not cases:
        raise ConfigError(f"--lengths: allowed are {', '.join(str(length) for length, _ in suite)}")
    longest, known = max(length for length, _ in cases), subject.vocab_size
    if longest > subject.text.max_length:
        raise ConfigError(f"length {longest}, the model may see {subject.text.max_length}: choose with --lengths")
    if vocabulary > known:
        raise ConfigError(f"{vocabulary} ids, the model has {known}: set --option vocabulary to what it learned")


class RecallTask:
    """Accuracy in percent by number of pairs: words as keys and values, each key again, the value by arg-max."""

    name, version, main_metric = "recall", 1, "accuracy"

    def measure(self, subject: Subject, settings: TaskSettings, progress: Progress) -> dict[str, Any]:
        """Raises ConfigError or DataError for more pairs than the model's length or its tokenizer has words for."""
        asked = whole_numbers(settings, "pairs", ())
        words = word_tokens(subject.tokenizer, 4 * max(asked or PAIRS), settings.seed)
        possible = [pairs for pairs in PAIRS if 2 * pairs <= len(words) and 4 * pairs <= subject.max_length]
        wanted = asked or possible or PAIRS[:1]
        if 4 * max(wanted) > subject.max_length:
            raise ConfigError(
                f"{max(wanted)} pairs are {4 * max(wanted)} tokens, the model may see {subject.max_length}"
            )
        table = []
        for done, pairs in enumerate(wanted):
            progress(done, len(wanted))
            rows = recall_rows(words, pairs, QUESTIONS if settings.limit is None else settings.limit, settings.seed)
            accuracy = progress.once(str(pairs), partial(_recalled, subject, rows))
            table.append({"pairs": pairs, "accuracy": 100 * accuracy, "questions": len(rows) * pairs})
        progress(len(wanted), len(wanted))
        metrics = {f"accuracy@{line['pairs']}": line["accuracy"] for line in table}
        mean = fmean(metrics.values())
        return {"metrics": {"accuracy": mean, **metrics}, "tables": {"by_pairs": table}, "samples": table}


def _recalled(subject: Subject, rows: Tensor) -> float:
    def model(input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        return SimpleNamespace(logits=subject.logits(input_ids, last=logits_to_keep))

    return recall_accuracy(model, rows, subject.vocab_size)


RECALL = Family(
    "recall",
    "pairs of words, a value by its key: the probe of training, for any model",
    lambda _: RecallTask(),
    reads=("limit", "seed"),
    options={"pairs": f"numbers of pairs, separated by commas (default {','.join(map(str, PAIRS))})"},
)
FAMILY = Family(
    "mqar",
    "multi-query associative recall (Zoology), for models trained on it",
    lambda _: MqarTask(),
    reads=("limit", "seed", "lengths"),
    options={
        "suite": f"test set, {' or '.join(SUITES)}",
        "vocabulary": f"ids drawn from, an even number (default {VOCABULARY})",
    },
)
