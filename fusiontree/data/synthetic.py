"""Synthetic documents, mixed into training as rows of their own: needles in real text, and small structured tasks.

A row is a pure function of (seed, row, pass), as every other row is; each pass over the data has new ones. Tasks are
text, so that any tokenizer will do; each is about as long as it is asked to be, in characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fusiontree.data.config import TaskName
from fusiontree.data.rows import WHOLE, Part, StoredRows
from fusiontree.data.shuffle import Draw, Numbers, make_key
from fusiontree.data.store import Tokens

Haystack = Callable[[Draw, int], str]
Task = Callable[[Draw, int, Haystack], str]
Encode = Callable[[str], list[int]]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALLEST = 96  # tokens in which every task fits, one token per byte
TRIES, MOST_ROWS = 4, 64
FILLED = 0.8


def needle(draw: Draw, size: int, haystack: Haystack) -> str:
    """One fact somewhere in real text, asked for at the end.

    `… real text … The code of ruvek is 40917. … real text … Question: what is the code of ruvek? Answer: 40917`
    """
    fact, question, code = code_fact(draw)
    text = haystack(draw, max(size - len(fact) - len(question) - len(code), 0))
    depth = draw.below(len(text) + 1)
    return text[:depth] + fact + text[depth:] + question + code


def code_fact(draw: Draw) -> tuple[str, str, str]:
    """A fact, the question it answers and the answer; the evaluation task `needle_code` asks for the same."""
    name, code = _word(draw, 5), _number(draw, 5)
    return f" The code of {name} is {code}. ", f"\nQuestion: what is the code of {name}? Answer:", f" {code}"


def recall(draw: Draw, size: int, haystack: Haystack) -> str:
    """Pairs of keys and values, then the value of one key after another.

    `Pairs: bo=31 xa=07 lu=94. Ask: xa=07 bo=31 lu=94`
    """
    letters = 2 if size < 500 else 4  # so many that few keys are drawn twice
    drawn = (_word(draw, letters) for _ in range(max((size - 14) // (2 * letters + 8), 2)))
    keys = list(dict.fromkeys(drawn))
    values = {key: _number(draw, 2) for key in keys}
    asked = draw.shuffled(keys)
    return f"Pairs: {_pairs(keys, values)}. Ask: {_pairs(asked, values)}"


def copy(draw: Draw, size: int, haystack: Haystack) -> str:
    """Letters, and the same letters again.

    `Copy: q f a k | q f a k`
    """
    letters = _letters(draw, (size - 8) // 4)
    return f"Copy: {letters} | {letters}"


def reverse(draw: Draw, size: int, haystack: Haystack) -> str:
    """Letters, and the same letters from the last to the first.

    `Reverse: q f a k | k a f q`
    """
    letters = _letters(draw, (size - 11) // 4)
    return f"Reverse: {letters} | {letters[::-1]}"


def sort(draw: Draw, size: int, haystack: Haystack) -> str:
    """Numbers, and the same numbers from the smallest to the largest.

    `Sort: 52 07 91 | 07 52 91`
    """
    numbers = [_number(draw, 2) for _ in range(max((size - 8) // 6, 2))]
    return f"Sort: {' '.join(numbers)} | {' '.join(sorted(numbers))}"


def add(draw: Draw, size: int, haystack: Haystack) -> str:
    """A running sum modulo 100, written out after each summand.

    `Add: 12 +30=42 +61=03 +05=08`
    """
    total = draw.below(100)
    text = f"Add: {total:02d}"
    for _ in range(max((size - 7) // 7, 2)):
        summand = draw.below(100)
        total = (total + summand) % 100
        text += f" +{summand:02d}={total:02d}"
    return text


TASKS: dict[TaskName, Task] = {
    "needle": needle,
    "recall": recall,
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "add": add,
}


class SyntheticRows:
    """`count` rows per pass of synthetic documents; packed: filled up with several, else one of any length."""

    def __init__(
        self, names: Sequence[TaskName], count: int, length: int, key: int, *, packing: bool, encode: Encode, eos: int,
        haystack: Haystack,
    ) -> None:  # fmt: skip
        self.count = count
        self._tasks, self._length, self._key, self._packing = list(names), length, key, packing
        self._encode, self._eos, self._haystack = encode, eos, haystack

    def read(self, row: int, turn: int, part: Part = WHOLE) -> list[Tokens]:
        """The documents of a part of a row, each ended by eos, together at most so long as the part.

        Each part has documents of its own, so that none is cut whatever the length of the rows.
        """
        draw = self._draw(row, turn, *part)
        if not self._packing:
            return [self._document(draw, self._size(draw))]
        documents, room = [], self._length // part.parts
        while room >= min(SMALLEST, self._length // part.parts):
            size = min(SMALLEST + draw.below(room), room)
            documents.append(self._document(draw, size))
            room -= len(documents[-1])
        return documents

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        """Tokens in each of the rows, give or take a little where there is one document per row."""
        if self._packing:
            return np.full(len(rows), self._length)
        draws = (self._draw(row, turn, *WHOLE) for row, turn in zip(rows.tolist(), turns.tolist(), strict=True))
        return np.array([self._size(draw) for draw in draws], dtype=np.int64)

    def origins(self, row: int, turn: int, part: Part = WHOLE) -> list[str]:
        """A name for each document."""
        return [f"synthetic:{row}"] * len(self.read(row, turn, part))

    def _draw(self, row: int, turn: int, number: int, parts: int) -> Draw:
        return Draw(make_key(self._key, turn, row, number, parts))

    def _size(self, draw: Draw) -> int:
        return min(SMALLEST + draw.below(self._length), self._length)

    def _document(self, draw: Draw, size: int) -> Tokens:
        """A document of at most `size` tokens and, where the tokenizer lets it, at least four fifths of that."""
        task, seed = TASKS[self._tasks[draw.below(len(self._tasks))]], draw.next()
        room, characters = size - 1, size - 1
        best: list[int] = []
        for _ in range(TRIES):
            ids = self._encode(task(Draw(seed), characters, self._haystack))
            if len(best) < len(ids) <= room:
                best = ids
            if FILLED * room <= len(best):
                break
            characters = max(int(0.95 * characters * room / max(len(ids), 1)), 1)
        return np.array([*(best or ids[:room]), self._eos], dtype=np.int64)


class RealText:
    """Stretches of the real training text, for needles to lie in: rows drawn from all sources alike."""

    def __init__(self, readers: Sequence[StoredRows], decode: Callable[[list[int]], str], eos: int) -> None:
        self._readers, self._decode, self._eos = readers, decode, eos
        self._ends = np.cumsum([reader.count for reader in readers])

    def __call__(self, draw: Draw, size: int) -> str:
        """Up to `size` characters; fewer only where the rows drawn have fewer."""
        parts: list[str] = []
        missing = size
        for _ in range(MOST_ROWS):
            if missing <= 0:
                break
            chosen = draw.below(int(self._ends[-1]))
            source = int(np.searchsorted(self._ends, chosen, side="right"))
            documents = self._readers[source].read(chosen - int(self._ends[source]) + self._readers[source].count, 0)
            text = "\n\n".join(
                self._decode([token for token in ids.tolist() if token != self._eos]) for ids in documents
            )
            parts.append(text[:missing])
            missing -= len(text) + 2
        return "\n\n".join(parts)[:size]


def _word(draw: Draw, length: int) -> str:
    return "".join(LETTERS[draw.below(26)] for _ in range(length))


def _number(draw: Draw, digits: int) -> str:
    return f"{draw.below(10**digits):0{digits}d}"


def _letters(draw: Draw, count: int) -> str:
    return " ".join(_word(draw, 1) for _ in range(max(count, 2)))


def _pairs(keys: Sequence[str], values: dict[str, str]) -> str:
    return " ".join(f"{key}={values[key]}" for key in keys)
