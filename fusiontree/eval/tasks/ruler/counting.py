"""Counting tasks: the ten common words of a list (cwe), the three most frequent words of a coded text (fwe)."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import cached_property

from fusiontree.data.shuffle import Draw
from fusiontree.eval.tasks.ruler.maker import Question, Room, wording
from fusiontree.eval.tasks.words import all_words, coined

COMMON = 10
LONG = 4096  # tokens from which on cwe repeats its words more often
AMPLE = 1.1
ZETA_2 = math.pi**2 / 6  # the sum of 1/k²: word of rank k has the share 1 / (k² zeta(2))
CODE_LETTERS, TOKENS_PER_CODE, LEAST_CODES = 6, 50, 5
DOTS = "..."
TOP = 3


@dataclass(frozen=True)
class CommonWordsMaker:
    """Ten words stand in a numbered list more often than all others, after a worked example; sizes in words."""

    room: Room
    smallest: int = 2 * COMMON
    most: float = math.inf

    def question(self, draw: Draw, size: int, index: int) -> Question:
        """Common words 30 times and others 3 times; below 4,096 tokens 6 times and once."""
        return self._question(draw, size, self._long)

    @cached_property
    def _long(self) -> bool:
        """Also with a tokenizer to which 4,096 tokens are few words the short form is used."""
        least = self._question(Draw(0), self.smallest, True).prompt
        tokens = self.room.text.count(least) + wording("cwe").new_tokens
        return self.room.length >= LONG and AMPLE * tokens <= self.room.length

    def _question(self, draw: Draw, size: int, long: bool) -> Question:
        example, known = common_words(draw, 40, 10, 3) if long else common_words(draw, 20, 3, 1)
        context, common = common_words(draw, size, 30, 3) if long else common_words(draw, size, 6, 1)
        words = wording("cwe")
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(known, 1))
        text, lead = words.fill(context)
        return Question(f"{''.join(words.fill(example))} {answer}\n{text}", lead, tuple(common))


def common_words(draw: Draw, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """`1. word 2. word …` of `count` words, ten of them `often` and the others `seldom` times; and the ten."""
    pool = dict.fromkeys(all_words())
    while len(pool) < count:
        pool[coined(draw)] = None
    chosen = draw.sample(list(pool), count)
    common, others = chosen[:COMMON], chosen[COMMON:]
    entries = draw.shuffled(common * often + others * seldom)
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1)), common


@dataclass(frozen=True)
class FrequentWordsMaker:
    """Coded words whose frequencies fall as 1/rank², the first of them dots; sizes in words."""

    length: int
    most: float = math.inf

    @property
    def smallest(self) -> int:
        """So few words that the fourth rank has one and the fifth none."""
        return math.ceil((TOP + 1) ** 2 * ZETA_2)

    def question(self, draw: Draw, size: int, index: int) -> Question:
        """A size with as many words of the fifth rank as of the fourth has no answer: fewer are used."""
        codes = max((self.length - wording("fwe").new_tokens) // TOKENS_PER_CODE, LEAST_CODES)
        while _times(size, TOP + 1) == _times(size, TOP + 2):
            size -= 1
        names: dict[str, None] = {DOTS: None}
        while len(names) < codes:
            names["".join(draw.choose(string.ascii_lowercase) for _ in range(CODE_LETTERS))] = None
        entries = [name for rank, name in enumerate(names, 1) for _ in range(_times(size, rank))]
        text, lead = wording("fwe").fill(" ".join(draw.shuffled(entries)))
        return Question(text, lead, tuple(names)[1 : TOP + 1])


def _times(size: int, rank: int) -> int:
    return int(size / (ZETA_2 * rank**2))
