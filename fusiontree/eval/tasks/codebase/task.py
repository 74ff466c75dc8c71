"""Cross-file completion out of any folder of source files; without one, the running Python's standard library.

A question is a line that is the first in its file to use a name which another file of the folder defines. With
`codebase:cross_file` the prompt holds that definition, among others, before the file's own text up to the line; with
`codebase:in_file` the same text without them, so that the difference between the two is what the snippets give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from fusiontree.data.sources import STDLIB
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.codebase.generic import OtherFiles
from fusiontree.eval.tasks.codebase.python import PythonFiles
from fusiontree.eval.tasks.codebase.source import PYTHON, Definition, Use, source_files, standard_library
from fusiontree.eval.tasks.fit import room_for, shortened, without_start
from fusiontree.eval.tasks.repobench import line_scores, summary

SETTINGS = ("cross_file", "in_file")
ANSWER_TOKENS = 128
USES_PER_FILE = 3
MOST_SNIPPETS = 8


class Codebase:
    """Exact match and edit similarity of the line."""

    version = 1
    main_metric = "edit_similarity"

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.name = f"codebase:{setting}"

    def samples(self, text: TokenText, settings: TaskSettings) -> Iterator[Sample]:
        """One per use and length; files in an order that the seed gives, one use of each before a second of any."""
        root = corpus_folder(settings.data)
        lengths = settings.lengths or (text.max_length,)
        if max(lengths) > text.max_length:
            raise ConfigError(f"--lengths {max(lengths)}: the model sees no more than {text.max_length} tokens")
        room_for(text, ANSWER_TOKENS)
        if min(lengths) <= ANSWER_TOKENS:
            raise ConfigError(f"--lengths {min(lengths)}: {ANSWER_TOKENS} tokens of them are the answer's")
        questions = ((use, length) for use in chosen_uses(root, settings.seed) for length in lengths)
        for use, length in islice(questions, settings.limit):
            yield self._sample(text, root, use, length, settings.seed)

    def _sample(self, text: TokenText, root: Path, use: Use, length: int, seed: int) -> Sample:
        lines = source_files(root)[use.path].split("\n")
        room = length - ANSWER_TOKENS

        def build(limit: int) -> str:
            snippets, own = parts(text, use, lines, limit, random.Random(f"{seed}/{use.path}/{use.line}"))
            return ("".join(snippets) if self.setting == "cross_file" else "") + own

        return Sample(
            id=f"{use.path}:{use.line + 1}@{length}",
            prompt=shortened(text, build, room, room, chat=False),
            references=(lines[use.line],),
            max_new_tokens=ANSWER_TOKENS,
            facts={"length": length, "name": use.defined.name, "defined in": use.defined.path, "file": use.path},
        )

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """Exact match 0 or 1, edit similarity 0 … 100, of the first line that is code."""
        language = "python" if sample.facts["file"].endswith(PYTHON) else "java"
        return line_scores(output, sample.references[0], language)

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Percent of all and per length."""
        return summary(scored, "length")


def corpus_folder(data: Path | None) -> Path:
    """The folder that is meant; `stdlib`, or nothing, is the running Python's standard library."""
    return (standard_library() if data is None or data == Path(STDLIB) else data).resolve()


def chosen_uses(root: Path, seed: int) -> Iterator[Use]:
    """Up to three uses of each file in a seeded order, one of each before a second of any; no line twice.

    Raises DataError when no file uses another's names.
    """
    files = source_files(root)
    order = sorted(files)
    random.Random(seed).shuffle(order)
    seen: set[str] = set()
    later: list[list[Use]] = []
    for path in order:
        uses = _uses(root, path)
        picked = random.Random(f"{seed}/{path}").sample(uses, min(USES_PER_FILE, len(uses)))
        later.append(picked[1:])
        yield from _new(picked[:1], files, seen)
    for again in zip_longest(*later):
        yield from _new([use for use in again if use], files, seen)
    if not seen:
        raise DataError(f"{root}: none of its {len(files)} source files uses a name that another one defines")


def _new(uses: Sequence[Use], files: Mapping[str, str], seen: set[str]) -> Iterator[Use]:
    """Those whose line has not been asked for yet."""
    for use in uses:
        line = files[use.path].split("\n")[use.line].strip()
        if line not in seen:
            seen.add(line)
            yield use


def _uses(root: Path, path: str) -> list[Use]:
    """The uses in a file, one of each line."""
    python, others = _parsers(root)
    found = python.uses(path) if path.endswith(PYTHON) else others.uses(path)
    return list({use.line: use for use in reversed(found)}.values())[::-1]


@lru_cache(maxsize=2)
def _parsers(root: Path) -> tuple[PythonFiles, OtherFiles]:
    files = source_files(root)
    python = {path: text for path, text in files.items() if path.endswith(PYTHON)}
    return PythonFiles(python, root), OtherFiles({path: text for path, text in files.items() if path not in python})


def parts(text: TokenText, use: Use, lines: Sequence[str], limit: int, rng: random.Random) -> tuple[list[str], str]:
    """(snippets of other files, the file's own text up to the line), together about `limit` tokens.

    The definition asked for takes at most a quarter and always stands among the snippets; the file keeps its imports
    and as many of its last lines as fit; further snippets fill what is left.
    """
    gold = _most_lines(text, _snippet(use.defined).split("\n"), limit // 4, _first)
    own = _own_text(text, use, list(lines), limit - text.count(gold))
    snippets, left = [gold], limit - text.count(gold) - text.count(own)
    for other in rng.sample(use.others, min(len(use.others), MOST_SNIPPETS)):
        more = _snippet(other)
        if text.count(more) <= left:
            snippets.append(more)
            left -= text.count(more)
    rng.shuffle(snippets)
    return snippets, own


def _own_text(text: TokenText, use: Use, lines: list[str], limit: int) -> str:
    head = f"{_sign(use.path)} Path: {use.path}\n" + "".join(f"{line}\n" for line in lines[: use.body])
    own = lines[use.body : use.line]
    whole = head + "\n".join([*own, ""])
    if text.count(whole) <= limit:
        return whole
    if text.count(head) > limit // 2:
        return without_start(text, whole, limit)
    return head + _most_lines(text, own, limit - text.count(head), _last)


def _first(lines: list[str], count: int) -> str:
    return "".join(f"{line}\n" for line in lines[:count])


def _last(lines: list[str], count: int) -> str:
    return "".join(f"{line}\n" for line in lines[len(lines) - count :])


def _most_lines(text: TokenText, lines: list[str], limit: int, take: Callable[[list[str], int], str]) -> str:
    """As many of the lines as have at most `limit` tokens, by bisection."""
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.count(take(lines, middle)) <= limit else (low, middle - 1)
    return take(lines, low)


def _snippet(each: Definition) -> str:
    return f"{_sign(each.path)} Path: {each.path}\n{each.text}\n"


def _sign(path: str) -> str:
    return "#" if path.endswith(PYTHON) else "//"


FAMILY = Family(
    name="codebase",
    about="the next line of source files, with and without the definitions it needs from other files",
    make=Codebase,
    members=SETTINGS,
    reads=("limit", "seed", "lengths", "data"),
)
