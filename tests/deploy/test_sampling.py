"""The draw: exact against its definition, the same for the same seed and position, and only among what is allowed."""

from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fusiontree.deploy.sampling import Draw, GenerationOptions, next_tokens
from fusiontree.errors import ConfigError

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def next_token(logits: torch.Tensor, ids: list[int], options: GenerationOptions, seed: int) -> int | None:
    return next_tokens(logits[None], [Draw(ids, 1, options, seed)])[0]


def draws(options: GenerationOptions, count: int = 4000) -> dict[int, float]:
    rows = [Draw([0] * (1 + i % 7), 1, options, seed=i) for i in range(count)]
    counted = Counter(token for token in next_tokens(LOGITS.expand(count, -1), rows) if token is not None)
    return {token: number / count for token, number in counted.items()}


def test_temperature_zero_takes_the_most_probable() -> None:
    assert next_token(LOGITS, [3], GenerationOptions(), seed=5) == 0


def test_draws_follow_the_probabilities() -> None:
    found = draws(GenerationOptions(temperature=1.0))
    for token, probability in enumerate([0.5, 0.25, 0.15, 0.1]):
        assert found[token] == pytest.approx(probability, abs=0.03)


def test_top_k_and_top_p_keep_the_most_probable_and_their_proportions() -> None:
    assert set(draws(GenerationOptions(temperature=1.0, top_k=2))) == {0, 1}
    nucleus = draws(GenerationOptions(temperature=1.0, top_p=0.7))
    assert set(nucleus) == {0, 1}
    assert nucleus[0] == pytest.approx(2 / 3, abs=0.03)
    assert set(draws(GenerationOptions(temperature=1.0, top_p=0.01))) == {0}


def test_the_penalty_counts_every_token_of_the_text_once() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert next_token(logits, [0, 0, 0], GenerationOptions(repetition_penalty=1.5), 0) == 1
    assert next_token(logits, [0, 0, 0], GenerationOptions(repetition_penalty=1.2), 0) == 0
    assert next_token(torch.tensor([-1.0, -1.5]), [0], GenerationOptions(repetition_penalty=2.0), 0) == 1


def test_seed_and_position_decide_the_draw() -> None:
    options = GenerationOptions(temperature=1.0)
    assert [next_token(LOGITS, [1] * n, options, 3) for n in range(1, 50)] == [
        next_token(LOGITS, [2] * n, options, 3) for n in range(1, 50)
    ]
    assert len({tuple(next_token(LOGITS, [1] * n, options, seed) for n in range(1, 20)) for seed in range(10)}) == 10


@pytest.mark.parametrize("vocabulary", [300, 6000])
def test_rows_are_drawn_together_as_alone_and_among_what_transformers_allows(vocabulary: int) -> None:
    logits = 3 * torch.randn(24, vocabulary, generator=torch.Generator().manual_seed(0))
    rows = [
        Draw(
            list(range(5 + i)), 2,
            GenerationOptions(
                temperature=(0.0, 0.7, 1.5)[i % 3], top_k=(0, 5, 400)[i // 2 % 3], top_p=(1.0, 0.9, 0.99)[i // 3 % 3],
                frequency_penalty=i % 2 * 0.5, repetition_penalty=1 + i % 4 / 10,
            ),
            seed=i,
        )
        for i in range(24)
    ]  # fmt: skip
    together = next_tokens(logits, rows)
    assert together == [next_tokens(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    unread = torch.empty(1, 0, dtype=torch.long)
    for i, row in enumerate(rows):
        options = row.options
        if options.temperature == 0 or options.penalises:
            continue
        allowed = TemperatureLogitsWarper(options.temperature)(unread, logits[i : i + 1])
        if options.top_k:
            allowed = TopKLogitsWarper(options.top_k)(unread, allowed)
        if options.top_p < 1:
            allowed = TopPLogitsWarper(options.top_p)(unread, allowed)
        drawn = {next_tokens(logits[i : i + 1], [row._replace(seed=seed)])[0] for seed in range(40)}
        assert drawn <= set((allowed[0] > -torch.inf).nonzero()[:, 0].tolist())
    assert next_tokens(torch.stack([logits[0], torch.full_like(logits[0], torch.nan)]), rows[:2])[1] is None


def test_output_that_is_not_finite_is_no_token() -> None:
    for value in (float("nan"), float("inf")):
        assert next_token(torch.tensor([0.0, value]), [0], GenerationOptions(temperature=1.0), 0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": -1}, {"max_new_tokens": 1.5}, {"max_new_tokens": True},
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "1"},
        {"top_k": -1}, {"top_k": 2.0}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": float("nan")},
        {"presence_penalty": 2.1}, {"frequency_penalty": "x"},
        {"repetition_penalty": 0}, {"repetition_penalty": float("nan")}, {"seed": -1}, {"seed": "x"},
        {"stop": ""}, {"stop": ["a"] * 17}, {"stop": [3]}, {"stop": "x" * 201},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GenerationOptions(**wrong)
