"""Needles lie where they should, prompts are never longer than asked, reading finds them and guessing does not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusiontree.data.shuffle import Draw
from fusiontree.data.synthetic import needle
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.registry import find_tasks
from fusiontree.eval.task import Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.haystack import Haystack, load_haystack
from fusiontree.eval.tasks.needle import (
    PIZZA,
    SANDWICH,
    Hay,
    NeedleTask,
    grid_depths,
    grid_lengths,
    insert_needles,
    period_tokens,
    tokens_of,
)
from tests.eval.tasks.texts import KINDS, ask, grade, ignorant, token_text

TASKS = ("needle", "needle_multi", "needle_code")


def reader(prompt: str) -> str:
    """Reads the prompt and answers: the sentence about the city, those about pizza, or the code asked for."""
    asked = re.search(r"what is the code of (\w+)\?", prompt)
    if asked:
        return re.search(rf"The code of {asked[1]} is (\d+)\.", prompt)[1]
    pattern = "The best thing to do in San Francisco is"
    if "perfect pizza?" in prompt:
        pattern = "one of the secret ingredients needed"
    return " ".join(part for part in re.split(r"[.\n]", prompt.rpartition("Question:")[0]) if pattern in part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_reading_finds_everything_and_guessing_nothing(kind: str, name: str) -> None:
    (task,), text = find_tasks(name), token_text(kind, 2000)
    samples = ask(task, text, lengths=(1200, 1600), depths=(0, 33, 50, 100))
    assert [sample.id for sample in samples[:2]] == ["1200/0/0", "1200/33/0"] and len(samples) == 8
    assert grade(task, samples, reader) == 100 and grade(task, samples, ignorant) == 0
    for sample in samples:
        tokens = text.count(sample.prompt) + sample.max_new_tokens
        assert sample.facts["length"] - 120 <= tokens <= sample.facts["length"], "as long as asked, never longer"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 20, 57, 99, 100])
def test_the_place_of_a_needle(kind: str, depth: float) -> None:
    text, source = token_text(kind, 4000), load_haystack(None)
    tokens, periods = tokens_of(text, source, 3000), period_tokens(text)
    hidden = text.encode(SANDWICH.needles[0])
    context, (place,) = insert_needles(tokens, [hidden], depth, 2800, periods)
    assert len(context) == 2800 and context[place : place + len(hidden)] == hidden
    rest = context[:place] + context[place + len(hidden) :]
    assert rest == tokens[: 2800 - len(hidden)], "nothing else is moved"
    wanted = int((2800 - len(hidden)) * depth / 100)
    assert place == len(rest) if depth == 100 else place <= wanted
    assert place == 0 or depth == 100 or text.decode([rest[place - 1]]) == "."
    assert depth == 100 or not set(rest[place:wanted]) & periods, "the nearest sentence end before the depth"


def test_the_place_worked_by_hand() -> None:
    tokens = [1, 9, 2, 3, 9, 4, 5, 6, 7, 8]  # 9 is a full stop
    assert insert_needles(tokens, [[0]], 50, 11, {9}) == ([1, 9, 2, 3, 9, 0, 4, 5, 6, 7, 8], [5])
    assert insert_needles(tokens, [[0]], 49, 11, {9}) == ([1, 9, 0, 2, 3, 9, 4, 5, 6, 7, 8], [2])
    assert insert_needles(tokens, [[0]], 10, 11, {9})[1] == [0]
    assert insert_needles(tokens, [[0]], 100, 8, {9}) == ([1, 9, 2, 3, 9, 4, 5, 0], [7])
    # Three needles from 25 % on, a quarter of the text apart; each finds the others already in place.
    assert insert_needles([9] * 8, [[1], [2], [3]], 25, 100, {9})[0] == [9, 9, 1, 9, 2, 9, 9, 3, 9, 9, 9]


def test_several_needles_are_spread_from_the_depth_to_the_end() -> None:
    text = token_text("byte", 5000)
    (sample,) = ask(NeedleTask("needle_multi", PIZZA), text, lengths=(4000,), depths=(40,))
    room = 4000 - 100 - text.count(PIZZA.prompt(""))
    shares = [100 * place / room for place in sample.facts["places"]]
    assert shares == pytest.approx([40, 60, 80], abs=8) and shares == sorted(shares)
    assert all(phrase in sample.prompt.lower() for phrase in sample.references)


def test_the_buffer_is_two_hundred_tokens_where_that_is_enough() -> None:
    text = token_text("bpe", 4000)
    hay = Hay(text, Haystack("x", "All is well. " * 900), 2000, chat=False)
    prompt, _ = hay.prompt(SANDWICH, 2000, 50, 200, 20)
    frame = text.count(SANDWICH.prompt(""))
    assert frame + 20 < 200 and text.count(prompt) == 1800 + frame


def test_the_grid_of_the_original() -> None:
    settings = TaskSettings()
    assert grid_lengths(token_text("byte", 16000), settings)[:3] == [1000, 1441, 1882]
    assert len(grid_lengths(token_text("byte", 20000), settings)) == len(grid_depths(settings)) == 35
    assert grid_lengths(token_text("byte", 4000), settings)[-1] == 4000
    assert grid_depths(settings)[:4] == [0, 3, 6, 9] and grid_depths(settings)[-1] == 100
    dense = grid_depths(TaskSettings(options={"depth_spacing": "sigmoid"}))
    assert len(dense) == 35 and dense == sorted(dense) and dense[1] < 1.5 and np.diff(dense).argmax() in range(15, 19)


def test_a_limit_is_spread_over_the_grid_and_the_same_settings_give_the_same_samples() -> None:
    text, grid = token_text("byte", 2000), {"lengths": (1000, 1500, 2000), "depths": (0, 50, 100)}
    task = find_tasks("needle_code")[0]
    assert [s.id for s in ask(task, text, limit=3, **grid)] == ["1000/0/0", "1500/0/0", "2000/0/0"]
    twice = ask(task, text, seed=5, options={"repeats": "2"}, **grid)
    assert twice == ask(task, text, seed=5, options={"repeats": "2"}, **grid) and len(twice) == 18
    assert len({sample.references for sample in twice}) == 18
    other = ask(task, text, seed=6, options={"repeats": "2"}, **grid)
    assert not {s.references for s in twice} & {s.references for s in other}


def test_the_code_is_asked_for_in_the_words_of_the_training_rows() -> None:
    trained = needle(Draw(1), 300, lambda draw, size: "." * size)
    (sample,) = ask(find_tasks("needle_code")[0], token_text("byte", 900), lengths=(900,), depths=(50,))
    blank = [re.sub(r"code of \w+|\d{5}|(?<=Answer:).*", "", text) for text in (trained, sample.prompt)]
    fact, question = " The  is . ", "\nQuestion: what is the ? Answer:"
    assert all(fact in text and text.endswith(question) for text in blank)


def test_a_needle_of_the_users_own() -> None:
    own = {
        "needle": "Ada keeps bees.|Ada keeps two cats.",
        "question": "What does Ada keep?",
        "answer": "bees|two cats",
    }
    task = find_tasks("needle")[0]
    (sample,) = ask(task, token_text("byte", 900), lengths=(900,), depths=(50,), options=own)
    assert "\nAda keeps bees.\n" in sample.prompt and "Question: What does Ada keep?\nAnswer:" in sample.prompt
    assert task.score(sample, "BEES, I think") == {"substring_recall": 0.5}


def test_the_chat_template_counts() -> None:
    text = token_text("byte", 900)
    (sample,) = ask(find_tasks("needle")[0], text, lengths=(900,), depths=(50,), options={"chat": "yes"})
    assert sample.chat and text.count(text.chat(sample.prompt)) + sample.max_new_tokens == 900


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depths": (101,)}, "--depths 101"),
        ({"options": {"needle": "only this"}}, "give all three or none"),
        ({"options": {"needle": "a", "question": "b", "answer": "c|"}}, "is empty"),
        ({"options": {"buffer": "-1"}}, "--option buffer=-1"),
        ({"lengths": (200,)}, "length 200: needle, question and 100 tokens of answer leave no room"),
    ],
)
def test_what_cannot_be_is_one_clear_line(settings: dict, said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=re.escape(said)):
        ask(find_tasks("needle")[0], token_text("byte", 2000), **settings)


def test_a_full_stop_in_sentencepiece_style() -> None:
    """A lone full stop is another id there, with a blank in front; that id never stands in a text."""
    letters = {letter: index for index, letter in enumerate("▁.abcdefghijklmnopqrstuvwxyzAS")}
    core = Tokenizer(models.BPE(vocab={**letters, "▁.": len(letters)}, merges=[("▁", ".")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = TokenText(PreTrainedTokenizerFast(tokenizer_object=core), 100)
    told = text.encode("All is well. So it is.")
    assert text.encode(".") == [len(letters)] and len(letters) not in told
    context, (place,) = insert_needles(told, [[0]], 60, 100, period_tokens(text))
    assert text.decode(context[:place]) == "All is well."


def test_a_tokenizer_without_a_full_stop_is_refused() -> None:
    class NoStop:
        def encode(self, text: str) -> list[int]:
            return [1]

        def decode(self, ids: list[int]) -> str:
            return "end."

    with pytest.raises(DataError, match="full stop"):
        period_tokens(NoStop())


def test_the_grid_of_the_results() -> None:
    task = find_tasks("needle")[0]
    samples = ask(task, token_text("byte", 2000), lengths=(1000, 2000), depths=(0, 100))
    outputs = ["Eat a sandwich in Dolores Park on a sunny day", "", "a sandwich", "eat a SANDWICH"]
    scored = [Scored(s, o, task.score(s, o)) for s, o in zip(samples, outputs, strict=True)]
    summary = task.summarise(scored)
    assert summary["metrics"] == {"substring_recall": 33.33}
    assert summary["tables"]["grid"]["cells"] == [[100.0, 0.0], [0.0, 33.33]]
