"""Words for made-up questions: lists that come with the package, and coined ones where the lists end."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fusiontree.data.shuffle import Draw

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@cache
def word_list(name: str) -> tuple[str, ...]:
    """One of the lists of data/words.txt: nouns, adjectives, verbs, first names, last names."""
    text = (files("fusiontree.eval.tasks") / "data" / "words.txt").read_text("utf-8")
    sections = dict(section.split("]", 1) for section in text.split("\n[")[1:])
    return tuple(sections[name].split())


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs; none is part of another."""
    return word_list("nouns") + word_list("adjectives") + word_list("verbs")


def coined(draw: Draw) -> str:
    """A pronounceable word of eight letters that is in no list, such as `ruvekomi`: 24 million of them."""
    return "".join(draw.choose(CONSONANTS) + draw.choose(VOWELS) for _ in range(4))
