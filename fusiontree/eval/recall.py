"""Associative recall, small enough to be measured while training: is a value found again by its key?

Shapes: R rows, n pairs, L = 4 n tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fusiontree.errors import DataError

MAX_LOGITS = 1 << 24  # standing in memory at once: 64 MB in fp32


class RecallProbe:
    """Accuracy by number of pairs, always on the same rows; calls nothing but `model(**inputs)`.

    Raises DataError when the tokenizer has too few words for so many pairs.
    """

    def __init__(self, tokenizer: Any, pairs: Sequence[int], questions: int, seed: int = 0) -> None:
        words = word_tokens(tokenizer, 4 * max(pairs, default=0), seed)
        self.rows = {count: recall_rows(words, count, questions, seed) for count in pairs}
        self.vocabulary = len(tokenizer)

    def __call__(self, model: Callable[..., Any]) -> dict[str, float]:
        """`{"4": share of values found among 4 pairs, …}`."""
        return {str(count): recall_accuracy(model, rows, self.vocabulary) for count, rows in self.rows.items()}


def word_tokens(tokenizer: Any, count: int, seed: int = 0) -> list[int]:
    """Up to `count` ids from all over the vocabulary whose text is letters."""
    special, size = set(tokenizer.all_special_ids), len(tokenizer)
    order = random.Random(f"words {seed}").sample(range(size), size)
    found = (i for i in order if i not in special and tokenizer.decode([i]).strip().isalpha())
    return list(islice(found, count))


def recall_rows(words: Sequence[int], pairs: int, questions: int, seed: int = 0) -> Tensor:
    """Rows (R, 4 n) of n = `pairs` keys with their values, then every key again with its value, in another order.

    With n = 2: `sun oak | rain ash | rain ash | sun oak` (bars only here). Half of `words` are keys, half are values; R
    is so large that at least `questions` values are asked for. Zoology's multi-query associative recall
    (arXiv:2312.04927), in the tokens of the model's own tokenizer. Raises DataError when there are too few words.
    """
    keys, values = words[: len(words) // 2], words[len(words) // 2 :]
    if pairs > len(keys):
        raise DataError(f"recall: {pairs} pairs need {2 * pairs} tokens that are words, the tokenizer has {len(words)}")
    draw = random.Random(f"recall {pairs} {seed}")
    return torch.tensor([_row(draw, keys, values, pairs) for _ in range(-(-questions // pairs))])


def _row(draw: random.Random, keys: Sequence[int], values: Sequence[int], pairs: int) -> list[int]:
    told = [(key, draw.choice(values)) for key in draw.sample(keys, pairs)]
    return [token for pair in (*told, *draw.sample(told, pairs)) for token in pair]


def recall_accuracy(model: Callable[..., Any], rows: Tensor, vocabulary: int) -> float:
    """Share of the values in the second half of `rows` (R, 4 n) that are the model's first choice after their keys.

    A model that guesses finds about 1 / V.
    """
    asked = rows.shape[1] // 2
    found = []
    for some in rows.split(max(1, MAX_LOGITS // (asked * vocabulary))):
        after_keys = model(input_ids=some, use_cache=False, logits_to_keep=asked).logits[:, ::2]
        found.append((after_keys.argmax(-1) == some[:, -asked + 1 :: 2].to(after_keys.device)).sum())
    return int(torch.stack(found).sum()) / (len(rows) * asked // 2)
