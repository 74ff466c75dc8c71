"""What every kind of RULER-style question is made by: a size in, a question out; and the wording they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

from fusiontree.data.shuffle import Draw
from fusiontree.eval.task import TaskSettings, TokenText
from fusiontree.eval.tasks.haystack import Haystack, load_haystack, text_files


@dataclass(frozen=True)
class Question:
    """A question, how its answer begins (part of the prompt), what must come back, and facts about it."""

    text: str
    lead: str
    references: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The prompt for a model without a chat template."""
        return self.text + self.lead


@dataclass(frozen=True)
class Room:
    """What a maker may know: the tokenizer, the length in tokens to fill, the settings, the text for haystacks."""

    text: TokenText
    length: int
    settings: TaskSettings

    def haystack(self) -> Haystack:
        """The text of `--data` where that is text or a folder with some, else the default."""
        data = self.settings.data
        if data is not None and (data.suffix == ".json" or (data.is_dir() and not text_files(data))):
            data = None  # the official files of qa_1 and qa_2
        return load_haystack(data)


class Maker(Protocol):
    """Makes questions of any size."""

    @property
    def smallest(self) -> int:
        """The least size that is a question."""

    @property
    def most(self) -> float:
        """How many questions there are."""

    def question(self, draw: Draw, size: int, index: int) -> Question:
        """Question `index` with a haystack of so many sentences, words, entries or documents."""


@dataclass(frozen=True)
class Wording:
    """The question with {context} in it, how the answer begins, and how many tokens it may have."""

    question: str
    lead: str
    new_tokens: int

    def fill(self, context: str, **words: Any) -> tuple[str, str]:
        """Question and lead around a context."""
        return self.question.format(context=context, **words), self.lead.format(**words)


@cache
def wording(kind: str) -> Wording:
    """The wording of niah, vt, cwe, fwe or qa."""
    text = (files("fusiontree.eval.tasks") / "data" / "ruler_prompts.json").read_text("utf-8")
    return Wording(**json.loads(text)[kind])
