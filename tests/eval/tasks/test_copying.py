"""Copying and looking up: questions that can be answered, sizes that fit, scores worked by hand."""

from __future__ import annotations

import re

import pytest

from fusiontree.data.shuffle import Draw
from fusiontree.errors import ConfigError
from fusiontree.eval.registry import find_tasks
from fusiontree.eval.task import Scored
from fusiontree.eval.tasks.copying import copying, phonebook
from tests.eval.tasks.texts import KINDS, ask, grade, ignorant, token_text


def reader(prompt: str) -> str:
    *lines, last = prompt.split("\n")
    if last.startswith("Copy:"):
        return last.removeprefix("Copy:").removesuffix("|")
    return next(line.removeprefix(last) for line in lines if line.startswith(f"{last} "))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copy", "phonebook"])
def test_reading_finds_everything_and_guessing_nothing(name: str, kind: str) -> None:
    (task,), text = find_tasks(name), token_text(kind, 1500)
    samples = ask(task, text, limit=20)
    assert grade(task, samples, reader) == 100 and grade(task, samples, ignorant) == 0
    assert all(text.count(s.prompt) + s.max_new_tokens <= 1500 and s.stop == ("\n",) for s in samples)
    assert all(len(text.encode(f" {s.references[0]}")) < s.max_new_tokens for s in samples), "room for the answer"
    assert [s.id for s in samples[:2]] == ["10/0", "20/0"] and samples == ask(task, text, limit=20)
    assert len({s.references for s in samples}) == 20
    assert samples[0].references != ask(task, text, limit=1, seed=1)[0].references


def test_the_questions() -> None:
    asked = copying(Draw(0), 6)
    assert re.fullmatch(r"Copy: (\w \w \w) \| \1\nCopy: (\w( \w){5}) \|", asked.prompt)
    assert f"Copy: {asked.answer} |" in asked.prompt
    for key in range(50):
        asked = phonebook(Draw(key), 11)
        told, shown = asked.prompt.split("\n\nLook up:\n")
        entries, (*examples, last) = told.split("\n"), shown.split("\n")
        assert len(set(entries)) == 11 and len(examples) == 2 and set(examples) < set(entries)
        place = entries.index(f"{last} {asked.answer}")
        assert asked.fifth == 5 * place // 11 and f"{last} {asked.answer}" not in examples
        assert re.fullmatch(r"\d{3}-\d{4}", asked.answer)


def test_sizes_that_fit_and_those_that_do_not() -> None:
    (task,), text = find_tasks("phonebook"), token_text("byte", 600)
    assert {sample.facts["size"] for sample in ask(task, text)} == {10, 20}
    for sizes, said in (("5,100", "size 100 does not fit the 600"), ("2", "at least 3"), ("20000", "more than 10000")):
        with pytest.raises(ConfigError, match=said):
            ask(task, text, options={"sizes": sizes})
    with pytest.raises(ConfigError, match="size 10 does not fit the 60"):
        ask(task, token_text("byte", 60))
    # At the border every question is counted: each of those that are asked fits.
    border = max(text.count(s.prompt) + s.max_new_tokens for s in ask(task, text, options={"sizes": "20"}))
    assert len(ask(task, token_text("byte", border), options={"sizes": "20"})) == 100
    with pytest.raises(ConfigError, match="size 20 does not fit"):
        ask(task, token_text("byte", border - 1), options={"sizes": "20"})


def test_scores_and_tables() -> None:
    (task,) = find_tasks("phonebook")
    samples = ask(task, token_text("byte", 2000), options={"sizes": "5"}, limit=4)
    number = samples[0].references[0]
    assert task.score(samples[0], f" {number} ") == {"exact": 1.0, "letters": 1.0}
    assert task.score(samples[0], f"{number[:4]}????") == {"exact": 0.0, "letters": 0.5}
    assert task.score(samples[0], "") == {"exact": 0.0, "letters": 0.0}
    scored = [Scored(s, s.references[0], task.score(s, s.references[0])) for s in samples]
    summary = task.summarise([*scored[:2], *(Scored(s.sample, "", task.score(s.sample, "")) for s in scored[2:])])
    assert summary["metrics"] == {"exact": 50.0, "letters": 50.0}
    assert summary["tables"]["by_size"] == [{"size": 5, "exact": 50.0, "letters": 50.0, "samples": 4}]
    assert summary["tables"]["grid"]["row"] == "fifth" and sum(map(sum, summary["tables"]["grid"]["counts"])) == 4
