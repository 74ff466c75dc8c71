"""Needle in a haystack: a fact put somewhere into a long text, asked for at the end, over lengths and depths.

    … text. The best thing to do in San Francisco is eat a sandwich … text. … Question: What is the best thing …?

Lengths, depths, places of the needles and buffer are those of the original (LLMTest_NeedleInAHaystack by G. Kamradt).
It has a model judge the answers; here the key phrases in them are counted: substring recall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusiontree.data.shuffle import Draw, make_key
from fusiontree.data.synthetic import code_fact
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.heatmap import make_grid
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Counted, Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.haystack import Haystack, load_haystack
from fusiontree.eval.tasks.options import one_of, whole_number

SHORTEST, LONGEST, INTERVALS = 1000, 16000, 35  # the original's grid: so many lengths and so many depths
BUFFER = 200  # tokens of the length that are kept free for question and answer
NEW_TOKENS = 100  # the original allows 300; the answer has about 25
FRAME = (
    "Read the text. Answer the question at its end from the text alone, short and direct.\n\n"
    "{context}\n\nQuestion: {question}\nAnswer:"
)
SEPARATOR = "|"


@dataclass(frozen=True)
class Facts:
    """What is hidden, what is asked and which phrases must come back."""

    needles: tuple[str, ...]
    question: str
    phrases: tuple[str, ...]
    frame: str = FRAME

    def prompt(self, context: str) -> str:
        """The whole prompt around a text."""
        return self.frame.replace("{question}", self.question).replace("{context}", context)


SANDWICH = Facts(
    ("\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n",),
    "What is the best thing to do in San Francisco?",
    ("eat a sandwich", "Dolores Park", "sunny day"),
)
PIZZA = Facts(
    tuple(
        f" {what} one of the secret ingredients needed to build the perfect pizza. "
        for what in ("Figs are", "Prosciutto is", "Goat cheese is")
    ),
    "What are the secret ingredients needed to build the perfect pizza?",
    ("figs", "prosciutto", "goat cheese"),
)


class NeedleTask:
    """A sample per length and depth. Without facts of its own another code is asked for in each sample, in the words of
    the synthetic training rows (`fusiontree.data.synthetic.needle`)."""

    version, main_metric = 1, "substring_recall"

    def __init__(self, name: str, facts: Facts | None) -> None:
        self.name, self._facts = name, facts

    def samples(self, text: TokenText, settings: TaskSettings) -> Counted:
        """The cells, the shortest first; with a limit so many of them, evenly spread over the grid."""
        haystack = load_haystack(settings.data)
        repeats = whole_number(settings, "repeats", 1) if self._facts is None else 1
        cells = [
            (length, depth, turn)
            for length in grid_lengths(text, settings)
            for depth in grid_depths(settings)
            for turn in range(repeats)
        ]
        count = len(cells) if settings.limit is None else min(settings.limit, len(cells))
        chat = one_of(settings, "chat", ("no", "yes")) == "yes"
        hay = Hay(text, haystack, max(length for length, _, _ in cells), chat)
        chosen = (cells[index * len(cells) // count] for index in range(count))
        return Counted((self._sample(hay, *cell, settings) for cell in chosen), count)

    def _sample(self, hay: Hay, length: int, depth: float, turn: int, settings: TaskSettings) -> Sample:
        facts = self._facts_of(length, depth, turn, settings)
        new_tokens = whole_number(settings, "new_tokens", NEW_TOKENS)
        buffer = whole_number(settings, "buffer", BUFFER, least=0)
        prompt, places = hay.prompt(facts, length, depth, buffer, new_tokens)
        told = {"length": length, "depth": depth, "places": places, "haystack": hay.source.label}
        name = f"{length}/{depth:g}/{turn}"
        return Sample(name, prompt, facts.phrases, new_tokens, facts=told, chat=hay.chat)

    def _facts_of(self, length: int, depth: float, turn: int, settings: TaskSettings) -> Facts:
        if self._facts is not None:
            return own_facts(self._facts, settings)
        fact, question, code = code_fact(Draw(make_key(settings.seed, length, int(1000 * depth), turn)))
        return Facts((fact,), question, (code.strip(),), "{context}{question}")

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """Share of the key phrases in the answer, upper and lower case alike."""
        found = sum(phrase.lower() in output.lower() for phrase in sample.references)
        return {"substring_recall": found / len(sample.references)}

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Mean in percent, and the grid of depths × lengths."""
        grid = make_grid(scored, "depth", "length", self.main_metric)
        mean = 100 * sum(one.scores[self.main_metric] for one in scored) / len(scored)
        return {"metrics": {self.main_metric: round(mean, 2)}, "tables": {"grid": grid}}


class Hay:
    """A haystack in the tokens of a model."""

    def __init__(self, text: TokenText, source: Haystack, longest: int, chat: bool) -> None:
        self.text, self.source, self.chat = text, source, chat
        self._tokens = tokens_of(text, source, longest)
        self._periods = period_tokens(text)

    def prompt(self, facts: Facts, length: int, depth: float, buffer: int, new_tokens: int) -> tuple[str, list[int]]:
        """The prompt with its needles, and their places in tokens of the text.

        Text and needles have `length - buffer` tokens, fewer where question and answer need more than the buffer: the
        prompt and `new_tokens` together are never longer than `length`. Raises DataError when nothing is left.
        """
        needles = [self.text.encode(needle) for needle in facts.needles]
        room = length - max(buffer, self._count(facts.prompt("")) + new_tokens)
        while room > sum(map(len, needles)):
            tokens, places = insert_needles(self._tokens[:length], needles, depth, room, self._periods)
            prompt = facts.prompt(self.text.decode(tokens))
            excess = self._count(prompt) + new_tokens - length
            if excess <= 0:
                return prompt, places
            room -= excess
        raise DataError(f"length {length}: needle, question and {new_tokens} tokens of answer leave no room for text")

    def _count(self, prompt: str) -> int:
        return self.text.count(self.text.chat(prompt) if self.chat else prompt)


def insert_needles(
    tokens: Sequence[int], needles: Sequence[Sequence[int]], depth: float, room: int, periods: Set[int]
) -> tuple[list[int], list[int]]:
    """The text cut so that it has at most `room` tokens with the needles in it, and where each needle was put.

    The first lies at `depth` percent, moved back to the end of a sentence, the others evenly between there and the end;
    at 100 they are appended.
    """
    context = list(tokens[: room - sum(map(len, needles))])
    step, places = (100 - depth) / len(needles), []
    for needle in needles:
        place = len(context)
        if depth != 100:
            place = int(len(context) * (depth / 100))
            while place > 0 and context[place - 1] not in periods:
                place -= 1
        context[place:place] = needle
        places.append(place)
        depth += step
    return context, places


def period_tokens(text: TokenText) -> set[int]:
    """The ids of a full stop, alone and after a word: SentencePiece writes the first one with a blank in front."""
    last = [ids[-1] for ids in (text.encode("."), text.encode("end.")) if ids]
    found = {token for token in last if text.decode([token]).strip() == "."}
    if not found:
        raise DataError("tokenizer: has no token for a full stop alone, so that no end of a sentence can be found")
    return found


def tokens_of(text: TokenText, haystack: Haystack, count: int) -> list[int]:
    """The first `count` tokens or more of the text, which is repeated as often as needed."""
    characters = 8 * count
    while True:
        repeats = -(-characters // len(haystack.text))
        tokens = text.encode((haystack.text * repeats)[:characters])
        if len(tokens) >= count + 16:  # the last ones may be those of a word cut in two
            return tokens
        characters *= 2


def own_facts(standard: Facts, settings: TaskSettings) -> Facts:
    """The standard needle, or that of the options `needle`, `question` and `answer`."""
    given = [settings.options.get(key) for key in ("needle", "question", "answer")]
    if not any(given):
        return standard
    if None in given:
        raise ConfigError("--option needle, question and answer: give all three or none")
    needle, question, answer = (str(value) for value in given)
    phrases = tuple(phrase.strip() for phrase in answer.split(SEPARATOR))
    needles = tuple(f"\n{one.strip()}\n" for one in needle.split(SEPARATOR))
    if not all((*phrases, *(one.strip() for one in needles))):
        raise ConfigError(f"--option needle, answer: a part between {SEPARATOR} is empty")
    return Facts(needles, question, phrases)


def grid_lengths(text: TokenText, settings: TaskSettings) -> list[int]:
    """The lengths asked for, else 35 from 1,000 to 16,000 or to what the model may see, if that is less."""
    if settings.lengths:
        return list(settings.lengths)
    longest = min(LONGEST, text.max_length)
    steps = np.linspace(min(SHORTEST, longest), longest, INTERVALS)
    return list(dict.fromkeys(np.round(steps).astype(int).tolist()))


def grid_depths(settings: TaskSettings) -> list[float]:
    """The depths asked for in percent, else 35 from 0 to 100, evenly (rounded) or denser at both ends (`sigmoid`)."""
    if settings.depths:
        wrong = [depth for depth in settings.depths if not 0 <= depth <= 100]
        if wrong:
            raise ConfigError(f"--depths {wrong[0]:g}: must be from 0 to 100 percent")
        return list(settings.depths)
    steps = np.linspace(0, 100, INTERVALS)
    if one_of(settings, "depth_spacing", ("linear", "sigmoid")) == "linear":
        return np.round(steps).tolist()
    inner = [round(100 / (1 + math.exp(0.1 * (step - 50))), 3) for step in steps.tolist()[1:-1]]
    return [0.0, *sorted(inner), 100.0]


OPTIONS = {
    "needle": f"the fact to hide; several between {SEPARATOR}",
    "question": "what is asked",
    "answer": f"the phrases counted in the answer, between {SEPARATOR}",
    "buffer": f"tokens of the length kept free for question and answer (default {BUFFER})",
    "new_tokens": f"tokens of the answer (default {NEW_TOKENS})",
    "depth_spacing": "linear or sigmoid, where no depths are given",
    "chat": "yes: through the tokenizer's chat template",
}
REPEATS = {"repeats": "codes asked for per length and depth (default 1)"}
READS = ("limit", "lengths", "depths", "data")
SINGLE = Family(
    "needle", "one fact in a long text: lengths × depths", lambda _: NeedleTask("needle", SANDWICH),
    reads=READS, options=OPTIONS,
)  # fmt: skip
MULTI = Family(
    "needle_multi", "three facts spread from the depth to the end", lambda _: NeedleTask("needle_multi", PIZZA),
    reads=READS, options=OPTIONS,
)  # fmt: skip
CODE = Family(
    "needle_code", "a random code, in the words of the synthetic training rows",
    lambda _: NeedleTask("needle_code", None),
    reads=(*READS, "seed"),
    options={**{key: OPTIONS[key] for key in ("buffer", "new_tokens", "depth_spacing", "chat")}, **REPEATS},
)  # fmt: skip
