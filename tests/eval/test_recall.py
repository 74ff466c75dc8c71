"""Recall: rows that ask for every value once, scored where the answer stands, the same at every call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusiontree import HybridConfig, HybridLanguageModel
from fusiontree.data import byte_tokenizer
from fusiontree.errors import DataError
from fusiontree.eval import recall
from fusiontree.eval.recall import RecallProbe, recall_accuracy, recall_rows, word_tokens

VOCABULARY = 300


def induction(input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
    """Predicts what followed the token the last time it came; token 0 where it has not come before."""
    rows = []
    for row in input_ids.tolist():
        seen: dict[int, int] = {}
        predicted = []
        for place, token in enumerate(row):
            predicted.append(seen.get(token, 0))
            if place:
                seen[row[place - 1]] = token
        rows.append(predicted)
    return SimpleNamespace(logits=F.one_hot(torch.tensor(rows)[:, -logits_to_keep:], VOCABULARY).float())


@pytest.mark.parametrize("pairs", [1, 2, 7, 16])
def test_every_key_is_told_once_and_asked_once(pairs: int) -> None:
    words = list(range(100, 164))
    rows = recall_rows(words, pairs, questions=30)
    assert rows.shape == (-(-30 // pairs), 4 * pairs)
    for row in rows.tolist():
        told = list(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        asked = list(zip(row[2 * pairs :: 2], row[2 * pairs + 1 :: 2], strict=True))
        assert len({key for key, _ in told}) == pairs and sorted(told) == sorted(asked)
        assert {key for key, _ in told} <= set(words[:32]) and {value for _, value in told} <= set(words[32:])


def test_rows_are_the_same_for_a_seed_and_others_for_another() -> None:
    words = list(range(64))
    assert torch.equal(recall_rows(words, 8, 64, seed=1), recall_rows(words, 8, 64, seed=1))
    assert not torch.equal(recall_rows(words, 8, 64, seed=1), recall_rows(words, 8, 64, seed=2))
    assert len({tuple(row) for row in recall_rows(words, 8, 64).tolist()}) == 8


@pytest.mark.parametrize("limit", [1, 1 << 24])
def test_who_remembers_finds_all_and_who_guesses_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(recall, "MAX_LOGITS", limit)
    rows = recall_rows(list(range(1, 65)), 8, questions=100)
    assert recall_accuracy(induction, rows, VOCABULARY) == 1.0
    blind = lambda **inputs: SimpleNamespace(logits=torch.zeros(len(inputs["input_ids"]), 16, VOCABULARY))  # noqa: E731
    assert recall_accuracy(blind, rows, VOCABULARY) == 0.0


def test_half_of_the_answers_is_one_half() -> None:
    """A model that looks at the first half of what it was told only."""

    def forgetful(input_ids: Tensor, **more: Any) -> Any:
        known = input_ids.clone()
        known[:, 8:16] = 0
        return induction(known, **more)

    assert recall_accuracy(forgetful, recall_rows(list(range(1, 65)), 8, questions=64), VOCABULARY) == 0.5


def test_words_are_tokens_made_of_letters() -> None:
    tokenizer = byte_tokenizer()
    words = word_tokens(tokenizer, 1000)
    assert sorted(tokenizer.decode(words)) == sorted("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert word_tokens(tokenizer, 10) == words[:10] != word_tokens(tokenizer, 10, seed=1)


def test_too_many_pairs_for_the_vocabulary_are_refused() -> None:
    RecallProbe(byte_tokenizer(), [26], questions=1)
    with pytest.raises(DataError, match="27 pairs need 54 tokens that are words, the tokenizer has 52"):
        RecallProbe(byte_tokenizer(), [4, 27], questions=1)


def test_a_model_is_only_called() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "mamba_head_dim": 16, "mamba_d_state": 8, "gate_rank": 4}
    model = HybridLanguageModel(HybridConfig(vocab_size=258, num_hidden_layers=2, sliding_window=8, **sizes)).eval()
    probe = RecallProbe(byte_tokenizer(), [2, 6], questions=12)
    with torch.no_grad():
        found = probe(lambda **inputs: model(**inputs))
        assert found == probe(model)
    assert list(found) == ["2", "6"] and all(0 <= value <= 0.5 for value in found.values())
