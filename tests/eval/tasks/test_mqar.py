"""MQAR: the reference's rows, the rules of the task, accuracy worked by hand, models that know all and nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusiontree.errors import ConfigError
from fusiontree.eval.task import TaskSettings
from fusiontree.eval.tasks.mqar import SUITES, MqarTask, mqar_accuracy, mqar_rows


def rows(count: int, *sizes: int, seed: int = 0, **settings: Any) -> tuple[Tensor, Tensor]:
    return mqar_rows(count, *sizes, np.random.RandomState(seed), **settings)


def test_the_rows_of_the_reference_generator() -> None:
    """multiquery_ar of zoology with vocab_size 64, two rows of 24, four pairs, seed 0, without filler."""
    inputs, labels = rows(2, 24, 4, 64, filler=False)
    assert inputs[0].tolist() == [3, 54, 30, 59, 14, 48, 11, 45, 30, 0, 3, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 14, 0]
    asked = {place: value for place, value in enumerate(labels[0].tolist()) if value != -100}
    assert asked == {8: 59, 10: 54, 14: 45, 22: 48}


@pytest.mark.parametrize("filler", [True, False])
def test_each_query_asks_for_a_pair_told_before(filler: bool) -> None:
    inputs, labels = rows(50, 64, 8, 512, filler=filler)
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        told = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(told) == 8 and all(0 < key < 256 for key in told) and all(256 <= v < 512 for v in told.values())
        asked = {place: value for place, value in enumerate(wanted) if value != -100}
        assert {row[place] for place in asked} == set(told), "each pair is asked for once"
        assert all(told[row[place]] == value and place >= 16 and place % 2 == 0 for place, value in asked.items())
        rest = [token for place, token in enumerate(row[16:], 16) if place not in asked]
        assert filler == any(rest) and all(0 <= token < 512 for token in rest)


def test_one_generator_makes_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = rows(5, 32, 4, 64, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first[0], rows(5, 32, 4, 64, seed=7)[0]), "nothing global is read"
    assert not torch.equal(first[0], rows(5, 32, 4, 64, seed=8)[0])
    state = np.random.get_state()[1]
    np.random.seed(1)
    assert np.array_equal(state, np.random.get_state()[1]), "nothing global is moved"


@pytest.mark.parametrize("sizes", [(63, 4, 512), (64, 17, 512), (64, 4, 64), (64, 4, 129), (64, 0, 512)])
def test_sizes_that_cannot_be(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="needs an even length"):
        rows(1, *sizes)


def test_accuracy_worked_by_hand() -> None:
    labels = torch.tensor([[-100, 2, -100, 1], [3, -100, -100, -100], [0, 1, 2, 3]])
    guesses = torch.tensor([[0, 2, 1, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(guesses, 4).float()
    assert mqar_accuracy(logits, labels).tolist() == [0.5, 1.0, 0.25]


class Parts:
    """What the runner tells and keeps."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.told: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.told.append((done, total))

    def once(self, key: str, measure: Any) -> Any:
        if key not in self.kept:
            self.kept[key] = measure()
        return self.kept[key]


def subject(logits: Any, vocabulary: int = 512, length: int = 512) -> Any:
    return SimpleNamespace(logits=logits, vocab_size=vocabulary, text=SimpleNamespace(max_length=length))


def remember(ids: Tensor) -> Tensor:
    """After a token: what followed it at its first place."""
    follows = torch.zeros_like(ids)
    for row, line in enumerate(ids.tolist()):
        for place, token in enumerate(line):
            follows[row, place] = line[min(line.index(token) + 1, len(line) - 1)]
    return torch.nn.functional.one_hot(follows, 512).float()


def test_a_model_that_remembers_and_one_that_does_not() -> None:
    settings = TaskSettings(limit=6, lengths=(64, 128), options={"vocabulary": "512"})
    parts = Parts()
    result = MqarTask().measure(subject(remember), settings, parts)
    assert (
        result["metrics"] == {"accuracy": 100.0} and parts.told[-1] == (2, 2) and set(parts.kept) == {"64x4", "128x8"}
    )
    assert result["tables"]["by_case"][1] == {"length": 128, "pairs": 8, "accuracy": 100.0, "error": 0.0, "rows": 3}
    assert len(result["samples"]) == 6 and result["samples"][3] == {"id": "128x8/0", "accuracy": 1.0}
    nothing = MqarTask().measure(subject(lambda ids: torch.zeros(*ids.shape, 512)), settings, Parts())
    assert nothing["metrics"] == {"accuracy": 0.0}


def test_the_published_sets() -> None:
    assert SUITES["zoology"] == (((64, 4), (128, 8), (256, 16), (512, 64)), 3000)
    assert [pairs for _, pairs in SUITES["based"][0]] == [4, 8, 16, 32, 64, 128, 256] and SUITES["based"][1] == 1000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (TaskSettings(lengths=(100,)), "allowed are 64, 128, 256, 512"),
        (TaskSettings(lengths=(64,)), "8192 ids, the model has 512"),
        (TaskSettings(options={"suite": "based"}), "length 1024, the model may see 512"),
        (TaskSettings(options={"suite": "x"}), "allowed: zoology, based"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(settings: TaskSettings, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MqarTask().measure(subject(remember), settings, Parts())
