"""Copying and looking up a number by a name: the two recall tasks any language model can be asked without training.

Both follow "Repeat After Me" (Jelassi and others 2024, arXiv:2402.01032).
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fusiontree.data.shuffle import Draw, make_key
from fusiontree.data.synthetic import copy
from fusiontree.errors import ConfigError
from fusiontree.eval.heatmap import make_grid
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Counted, Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.options import whole_numbers
from fusiontree.eval.tasks.words import word_list

SAMPLES = 100
SIZES = (10, 20, 50, 100, 200, 500, 1000)
FIFTHS = 5
EXAMPLES = 2
LARGEST = 10_000  # of the 17,000 names there are
AMPLE = 1.1
SPARE, STEP = 4, 16  # tokens


@dataclass(frozen=True)
class Asked:
    """A prompt, what must follow it, and where the answer stands in the prompt: fifths, 0 to 4."""

    prompt: str
    answer: str
    fifth: int | None = None


def copying(draw: Draw, size: int) -> Asked:
    """Letters to be written again, after a short example; the words of the synthetic training rows.

    `Copy: a k e | a k e⏎Copy: q f a k |` → `q f a k`
    """
    example, asked = (copy(draw, 4 * letters + 8, lambda _, wanted: "") for letters in (3, size))
    prompt, answer = asked.split(" | ")
    return Asked(f"{example}\n{prompt} |", answer)


def phonebook(draw: Draw, size: int) -> Asked:
    """Names with numbers, two of them looked up as examples, a third one asked for.

    `Amy Reed: 609-3237⏎…⏎⏎Look up:⏎Leo Hill: 130-4114⏎Ida Baker: 277-9051⏎Amy Reed:` → `609-3237`
    """
    names: dict[str, str] = {}
    numbers: set[str] = set()
    while len(names) < size:
        name = f"{draw.choose(word_list('first names'))} {draw.choose(word_list('last names'))}"
        number = f"{100 + draw.below(900)}-{draw.below(10_000):04d}"
        if name not in names and number not in numbers:
            names[name] = number
            numbers.add(number)
    lines = [f"{name}: {number}" for name, number in names.items()]
    *examples, place = draw.sample(range(size), EXAMPLES + 1)
    shown = "\n".join(lines[example] for example in examples)
    name, number = list(names.items())[place]
    return Asked(f"{chr(10).join(lines)}\n\nLook up:\n{shown}\n{name}:", number, FIFTHS * place // size)


@dataclass(frozen=True)
class RecallTask:
    """100 questions of each size; exact: the answer begins with what was asked for."""

    name: str
    ask: Callable[[Draw, int], Asked]
    least: int
    version: int = 1
    main_metric: str = "exact"

    def samples(self, text: TokenText, settings: TaskSettings) -> Counted:
        """The sizes take turns, so that a limit leaves as many of each; ConfigError for a size that does not fit."""
        sizes = self._sizes(text, settings)
        count = SAMPLES * len(sizes) if settings.limit is None else settings.limit
        places = ((sizes[number % len(sizes)], number // len(sizes)) for number in range(count))
        return Counted((self._sample(text, size, index, settings) for size, index in places), count)

    def _sample(self, text: TokenText, size: int, index: int, settings: TaskSettings) -> Sample:
        asked = self._asked(size, index, settings)
        facts = {"size": size, **({} if asked.fifth is None else {"fifth": asked.fifth})}
        new_tokens = _answer_tokens(text, asked)
        return Sample(f"{size}/{index}", asked.prompt, (asked.answer,), new_tokens, stop=("\n",), facts=facts)

    def _asked(self, size: int, index: int, settings: TaskSettings) -> Asked:
        return self.ask(Draw(make_key(settings.seed, zlib.crc32(self.name.encode()), size, index)), size)

    def _sizes(self, text: TokenText, settings: TaskSettings) -> list[int]:
        """The sizes asked for, else those of 10 … 1,000 that fit the model's length."""
        asked = whole_numbers(settings, "sizes", (), self.least)
        if max(asked, default=0) > LARGEST:
            raise ConfigError(f"size {max(asked)} is more than {LARGEST}")
        fitting = [size for size in asked or SIZES if self._fits(text, size, settings)]
        if not fitting or (asked and len(fitting) < len(asked)):
            wrong = next(size for size in asked or SIZES if size not in fitting)
            raise ConfigError(f"size {wrong} does not fit the {text.max_length} tokens the model may see")
        return fitting

    def _fits(self, text: TokenText, size: int, settings: TaskSettings) -> bool:
        """Whether every question of this size fits; where the first leaves ample room the others are not counted."""
        first = self._tokens(text, size, 0, settings)
        if first > text.max_length or AMPLE * first <= text.max_length:
            return first <= text.max_length
        return all(self._tokens(text, size, index, settings) <= text.max_length for index in range(SAMPLES))

    def _tokens(self, text: TokenText, size: int, index: int, settings: TaskSettings) -> int:
        asked = self._asked(size, index, settings)
        return text.count(asked.prompt) + _answer_tokens(text, asked)

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """Whether the answer begins with the reference, and the share of its letters or digits that are right."""
        wanted, given = ("".join(part.split()) for part in (sample.references[0], output))
        right = sum(one == other for one, other in zip(wanted, given, strict=False))
        return {"exact": float(given.startswith(wanted)), "letters": right / len(wanted)}

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Both in percent, over all and by size; with places also by fifth of the list × size."""
        by_size: dict[int, list[Scored]] = defaultdict(list)
        for one in scored:
            by_size[one.sample.facts["size"]].append(one)
        tables: dict[str, Any] = {"by_size": [{"size": size, **_line(some)} for size, some in sorted(by_size.items())]}
        if all("fifth" in one.sample.facts for one in scored):
            tables["grid"] = make_grid(scored, "fifth", "size", self.main_metric)
        line = _line(scored)
        return {"metrics": {"exact": line["exact"], "letters": line["letters"]}, "tables": tables}


def _line(scored: Sequence[Scored]) -> dict[str, float]:
    means = {name: 100 * sum(one.scores[name] for one in scored) / len(scored) for name in ("exact", "letters")}
    return {**{name: round(mean, 2) for name, mean in means.items()}, "samples": len(scored)}


def _answer_tokens(text: TokenText, asked: Asked) -> int:
    """Enough for the answer, another way to write it and the end of the line, in steps: answers are made in batches."""
    return STEP * -(-(len(text.encode(f" {asked.answer}")) + SPARE) // STEP)


READS = ("limit", "seed")
COPY = Family(
    "copy", "a string of letters, written again", lambda _: RecallTask("copy", copying, least=2),
    reads=READS, options={"sizes": f"letters, separated by commas (default {','.join(map(str, SIZES))})"},
)  # fmt: skip
PHONEBOOK = Family(
    "phonebook", "a number looked up by its name", lambda _: RecallTask("phonebook", phonebook, least=EXAMPLES + 1),
    reads=READS, options={"sizes": f"entries, separated by commas (default {','.join(map(str, SIZES))})"},
)  # fmt: skip
