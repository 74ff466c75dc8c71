"""The eight needle tasks: keys with values hidden between sentences, one or several of them asked for.

… One of the special magic numbers for brave-otter is: 4718293. … What is the special magic number for brave-otter …
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fusiontree.data.shuffle import Draw
from fusiontree.eval.tasks.haystack import Haystack, sentences
from fusiontree.eval.tasks.ruler.maker import Question, Wording, wording
from fusiontree.eval.tasks.words import word_list

Kind = Literal["words", "numbers", "uuids"]
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * step / 39) for step in range(40)]


@dataclass(frozen=True)
class NeedleKind:
    """One of the eight tasks: what lies around the needles and how many keys, values of a key and keys asked for."""

    hay: Literal["noise", "text", "needles"]
    keys: int = 1
    values: int = 1
    asked: int = 1
    key: Kind = "words"
    value: Kind = "numbers"


KINDS = {
    "niah_single_1": NeedleKind("noise"),
    "niah_single_2": NeedleKind("text"),
    "niah_single_3": NeedleKind("text", value="uuids"),
    "niah_multikey_1": NeedleKind("text", keys=4),
    "niah_multikey_2": NeedleKind("needles"),
    "niah_multikey_3": NeedleKind("needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleKind("text", values=4),
    "niah_multiquery": NeedleKind("text", keys=4, asked=4),
}


def random_string(draw: Draw, kind: Kind) -> str:
    """`brave-otter`, a number of seven digits, or a UUID."""
    if kind == "words":
        return f"{draw.choose(word_list('adjectives'))}-{draw.choose(word_list('nouns'))}"
    if kind == "numbers":
        return str(1_000_000 + draw.below(9_000_000))
    return str(uuid.UUID(int=draw.next() << 64 | draw.next(), version=4))


@dataclass(frozen=True)
class NeedleMaker:
    """Questions of one of the kinds; the size is in words of text, else in lines of noise or needles."""

    kind: NeedleKind
    haystack: Callable[[], Haystack]
    most: float = math.inf

    @property
    def smallest(self) -> int:
        """As many lines as needles, so that each finds a place of its own."""
        return self.kind.keys * self.kind.values

    def question(self, draw: Draw, size: int, index: int) -> Question:
        """Facts: the depth of each needle asked for, in percent of the sentences or lines."""
        kind, fresh = self.kind, Distinct(draw)
        pairs = [
            (key, fresh(kind.value)) for key in [fresh(kind.key) for _ in range(kind.keys)] for _ in range(kind.values)
        ]
        asked = draw.sample(list(dict.fromkeys(key for key, _ in pairs)), kind.asked)
        hidden = draw.shuffled(pairs)
        needles = [NEEDLE.format(kind=kind.value, key=key, value=value) for key, value in hidden]
        if kind.hay == "text":
            context, depths = between_sentences(draw, self.haystack().first_words(size), needles)
        else:
            context, depths = between_lines(draw, self._lines(fresh, size), needles)
        one = kind.asked * kind.values == 1
        query = asked[0] if kind.asked == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        text, lead = _wording(one).fill(context, type_needle_v=kind.value[:-1] if one else kind.value, query=query)
        references = tuple(value for wanted in asked for key, value in pairs if key == wanted)
        places = [depth for depth, (key, _) in zip(depths, hidden, strict=True) if key in asked]
        return Question(text, lead, references, {"depths": places})

    def _lines(self, fresh: Distinct, size: int) -> list[str]:
        if self.kind.hay == "noise":
            return [NOISE] * size
        kind = self.kind
        return [NEEDLE.format(kind=kind.value, key=fresh(kind.key), value=fresh(kind.value)) for _ in range(size)]


class Distinct:
    """Random strings that never repeat, so that a question has one answer."""

    def __init__(self, draw: Draw) -> None:
        self._draw, self._seen = draw, set[str]()

    def __call__(self, kind: Kind) -> str:
        """Another string."""
        while (text := random_string(self._draw, kind)) in self._seen:
            pass
        self._seen.add(text)
        return text


def between_sentences(draw: Draw, text: str, needles: Sequence[str]) -> tuple[str, list[float]]:
    """The needles, in this order, each before a sentence at one of forty depths; and those depths in percent."""
    parts = sentences(text)
    depths = sorted(draw.sample(DEPTHS, len(needles)))
    places = [int(len(parts) * depth / 100) for depth in depths]
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        parts.insert(place, needle)
    return " ".join(parts), [float(depth) for depth in depths]


def between_lines(draw: Draw, lines: Sequence[str], needles: Sequence[str]) -> tuple[str, list[float]]:
    """The needles, in this order, each before another line; and their depths in percent of the lines."""
    places = sorted(draw.sample(range(len(lines)), len(needles)))
    parts = list(lines)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        parts.insert(place, needle)
    return "\n".join(parts), [round(100 * place / len(lines), 1) for place in places]


def _wording(one: bool) -> Wording:
    """The wording, in the singular where one value is asked for."""
    many = wording("niah")
    if not one:
        return many
    question, lead = (
        part.replace("Some", "A").replace("are all", "is").replace("are", "is") for part in (many.question, many.lead)
    )
    return Wording(question, lead, many.new_tokens)
