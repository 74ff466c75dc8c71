"""Text, words and sizes that the made-up tasks are built from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data.shuffle import Draw
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.task import TaskSettings
from fusiontree.eval.tasks.haystack import Haystack, load_haystack, sentences
from fusiontree.eval.tasks.options import one_of, whole_numbers
from fusiontree.eval.tasks.sizes import largest
from fusiontree.eval.tasks.words import all_words, coined, word_list


def test_every_machine_has_a_haystack_of_prose() -> None:
    hay = load_haystack(None)
    assert len(hay.text) > 100_000 and len(sentences(hay.text)) > 1000
    assert ">>>" not in hay.text and "::=" not in hay.text
    assert hay.label.startswith("Python 3.") and "sha256:" in hay.label


def test_a_file_or_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second.\n")
    (tmp_path / "a.md").write_text("First.\n")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text('{"text": "Third."}\n')
    assert load_haystack(tmp_path).text.split() == ["First.", "Second."]
    assert load_haystack(tmp_path / "b.txt").text.strip() == "Second."
    assert load_haystack(tmp_path / "d.jsonl").text == "Third."
    assert load_haystack(tmp_path).label != load_haystack(tmp_path / "b.txt").label


def test_no_text_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.txt or \.md file"):
        load_haystack(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="no documents"):
        load_haystack(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="no such file"):
        load_haystack(tmp_path / "missing.txt")


def test_words_go_on_from_the_start() -> None:
    assert Haystack("x", "a b  c\n").first_words(7) == "a b c a b c a"


def test_sentences_end_where_they_should() -> None:
    text = 'One ends. Two of 3.5 ends! Did "three end?" (Yes.) It did, e.g. here.'
    assert sentences(text) == ["One ends.", "Two of 3.5 ends!", 'Did "three end?"', "(Yes.)", "It did, e.g. here."]
    assert sentences("no end") == ["no end"]


def test_no_word_is_part_of_another() -> None:
    words = all_words()
    assert len(words) == len(set(words)) > 1500
    inside = {w[i:j] for w in words for i in range(len(w)) for j in range(i + 3, len(w) + 1) if j - i < len(w)}
    assert not inside & set(words)
    assert len(set(word_list("first names"))) * len(set(word_list("last names"))) > 15_000
    made = {coined(Draw(key)) for key in range(500)}
    assert len(made) > 495 and all(len(word) == 8 for word in made) and not made & set(words)


@given(st.integers(1, 50), st.integers(0, 400), st.none() | st.integers(50, 300))
def test_the_largest_that_fits(smallest: int, limit: int, most: int | None) -> None:
    found = largest(lambda size: size <= limit, smallest, most)
    best = min(limit, most) if most is not None else limit
    assert found == (best if best >= smallest else None)


def test_draws_without_repetition() -> None:
    for count in (1, 5, 40, 100):
        assert len(set(Draw(3).sample(range(100), count))) == count
    assert sorted(Draw(1).shuffled("hello")) == sorted("hello") and Draw(1).choose("ab") in "ab"
    with pytest.raises(ValueError):
        Draw(0).sample("ab", 3)


def test_options_that_do_not_do() -> None:
    settings = TaskSettings(options={"sizes": "3, 4", "wrong": "3,x", "mode": "odd"})
    assert whole_numbers(settings, "sizes", ()) == (3, 4) and whole_numbers(settings, "absent", (7,)) == (7,)
    with pytest.raises(ConfigError, match="wrong=3,x: must be whole numbers of at least 1"):
        whole_numbers(settings, "wrong", ())
    with pytest.raises(ConfigError, match="sizes=3, 4: must be whole numbers of at least 4"):
        whole_numbers(settings, "sizes", (), least=4)
    with pytest.raises(ConfigError, match="mode=odd: allowed: even, none"):
        one_of(settings, "mode", ("even", "none"))
