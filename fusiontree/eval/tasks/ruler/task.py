"""The thirteen RULER-style tasks: sized to a length in tokens, scored as the original does."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusiontree.data.shuffle import Draw, make_key
from fusiontree.errors import DataError
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Counted, Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.options import one_of
from fusiontree.eval.tasks.ruler.chains import ChainMaker
from fusiontree.eval.tasks.ruler.counting import CommonWordsMaker, FrequentWordsMaker
from fusiontree.eval.tasks.ruler.documents import OFFICIAL, DocumentMaker, load_corpus
from fusiontree.eval.tasks.ruler.maker import Maker, Question, Room, wording
from fusiontree.eval.tasks.ruler.needles import KINDS, NeedleMaker
from fusiontree.eval.tasks.ruler.scoring import clean, string_match_all, string_match_part
from fusiontree.eval.tasks.ruler.summary import overall
from fusiontree.eval.tasks.sizes import largest

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SAMPLES = 500
SHRINK = 0.99  # a question that came out too long is made again, so much smaller
NAMES = (*KINDS, "vt", "cwe", "fwe", *OFFICIAL)


def make_maker(name: str, room: Room) -> Maker:
    """The maker of one of the tasks for one length."""
    if name in KINDS:
        return NeedleMaker(KINDS[name], room.haystack)
    if name in OFFICIAL:
        return DocumentMaker(load_corpus(name, room.settings.data))
    if name == "vt":
        return ChainMaker(room)
    return CommonWordsMaker(room) if name == "cwe" else FrequentWordsMaker(room.length)


@dataclass(frozen=True)
class Filled:
    """Questions of one task that fill one length: prompt and answer together never have more tokens."""

    maker: Maker
    room: Room
    name: str
    new_tokens: int

    def sample(self, index: int) -> Sample:
        """Question `index`, of the size that fits, and made again a little smaller where this one does not."""
        size, length = self._size, self.room.length
        while (made := self._made(size, index))[1] > length:
            if size <= self.maker.smallest:
                raise DataError(f"length {length}: the smallest question with its answer has {made[1]} tokens")
            size = max(min(int(SHRINK * size), size - 1), self.maker.smallest)
        prompt, tokens, question = made
        facts = {"length": length, "tokens": tokens, "size": size, **question.facts}
        return Sample(f"{length}/{index}", prompt, question.references, self.new_tokens, facts=facts)

    @cached_property
    def _size(self) -> int:
        """The largest size at which question 0 fits."""
        smallest = self.maker.smallest
        return largest(lambda size: self._made(size, 0)[1] <= self.room.length, smallest) or smallest

    def _made(self, size: int, index: int) -> tuple[str, int, Question]:
        """Prompt, its tokens with those of the answer, and the question."""
        settings, text = self.room.settings, self.room.text
        key = make_key(settings.seed, zlib.crc32(self.name.encode()), self.room.length, index)
        question = self.maker.question(Draw(key), size, index)
        chat = one_of(settings, "chat", ("no", "yes")) == "yes"
        prompt = text.chat(question.text) + question.lead if chat else question.prompt
        return prompt, text.count(prompt) + self.new_tokens, question


class RulerTask:
    """One of the thirteen at several lengths; the score is in percent."""

    version, main_metric = 1, "score"

    def __init__(self, name: str) -> None:
        self.name, self._short = f"ruler:{name}", name
        self._wording = wording(name if name in ("vt", "cwe", "fwe") else name.split("_")[0])

    def samples(self, text: TokenText, settings: TaskSettings) -> Counted:
        """500 at each length, the lengths taking turns, so that a limit leaves as many of each."""
        lengths = task_lengths(text, settings)
        rooms = [Room(text, length, settings) for length in lengths]
        sized = [Filled(make_maker(self._short, room), room, self.name, self._wording.new_tokens) for room in rooms]
        most = int(min(SAMPLES, sized[0].maker.most)) * len(lengths)
        count = most if settings.limit is None else min(settings.limit, most)
        numbers = (divmod(number, len(lengths)) for number in range(count))
        return Counted((sized[place].sample(index) for index, place in numbers), count)

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """Share of the references in the answer; with documents, whether any of them is."""
        match = string_match_part if self._short in OFFICIAL else string_match_all
        return {"score": match(clean(output), sample.references)}

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Score in percent, over all and by length, and how many answers are empty."""
        by_length: dict[int, list[Scored]] = defaultdict(list)
        for one in scored:
            by_length[one.sample.facts["length"]].append(one)
        table = [{"length": length, **_line(some)} for length, some in sorted(by_length.items())]
        return {"metrics": {"score": _line(scored)["score"]}, "tables": {"by_length": table}}


def _line(scored: Sequence[Scored]) -> dict[str, float]:
    mean = 100 * sum(one.scores["score"] for one in scored) / len(scored)
    return {"score": round(mean, 2), "samples": len(scored), "empty": sum(not clean(one.output) for one in scored)}


def task_lengths(text: TokenText, settings: TaskSettings) -> list[int]:
    """The lengths asked for, else those of 4K … 128K that the model may see, else all that it may see."""
    own = [length for length in LENGTHS if length <= text.max_length]
    return list(settings.lengths) or own or [text.max_length]


FAMILY = Family(
    "ruler",
    "thirteen RULER-style tasks: needles, chains, counting, documents",
    RulerTask,
    members=NAMES,
    reads=("limit", "seed", "lengths", "data"),
    overall=overall,
    options={"chat": "yes: the question in the tokenizer's chat template, the beginning of the answer after it"},
)
