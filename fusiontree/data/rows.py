"""Cutting documents into rows: which token stretches make up row k of a pass over a source, no other row looked at.

A *pass* is one visit to every document of a source. Both layouts are pure functions of (pieces, sequence length, key).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from fusiontree.data.shuffle import Numbers, make_key, permute
from fusiontree.data.splits import Pieces
from fusiontree.data.store import Tokens, TokenStore

Spans = list[tuple[int, int]]


class Part(NamedTuple):
    """Part `number` (from 0) of a row that is cut into `parts` of equal length."""

    number: int
    parts: int

    def bounds(self, tokens: int) -> tuple[int, int]:
        """The part's begin and end in a row of so many tokens; where a row is not full, each part is as much shorter.

        The bounds of long parts are bounds of short ones too, so the parts tile the row whatever their lengths.
        """
        return tokens * self.number // self.parts, tokens * (self.number + 1) // self.parts


WHOLE = Part(0, 1)


class Reader(Protocol):
    """What the loader asks of a source, whatever it is made of."""

    count: int
    """Rows in a pass."""

    def read(self, row: int, turn: int, part: Part = WHOLE) -> list[Tokens]:
        """The documents that fill a part of `row` of pass `turn`."""

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        """Tokens in each of the rows, `turns` naming the pass of each."""

    def origins(self, row: int, turn: int, part: Part = WHOLE) -> list[str]:
        """Where each of the documents came from."""


class Rows(Protocol):
    """A way to cut one source into rows."""

    count: int

    def spans(self, row: int, turn: int) -> Spans:
        """Token stretches [begin, end) of the store that fill `row` of pass `turn`, in order, one per document."""

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        """Tokens in each of the rows, `turns` naming the pass of each."""


class StoredRows:
    """Rows of a token store: the cutting and the tokens together."""

    def __init__(self, store: TokenStore, rows: Rows) -> None:
        self._store, self._rows, self.count = store, rows, rows.count

    def read(self, row: int, turn: int, part: Part = WHOLE) -> list[Tokens]:
        """The documents, or stretches of documents, that fill a part of a row."""
        return [self._store.read(begin, end) for begin, end in self._spans(row, turn, part)]

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        """Tokens in each of the rows."""
        return self._rows.lengths(rows, turns)

    def origins(self, row: int, turn: int, part: Part = WHOLE) -> list[str]:
        """`file:line` of each document in a part of a row."""
        offsets = self._store.offsets
        spans = self._spans(row, turn, part)
        return [self._store.locate(int(offsets.searchsorted(begin, side="right")) - 1) for begin, _ in spans]

    def _spans(self, row: int, turn: int, part: Part) -> Spans:
        spans = self._rows.spans(row, turn)
        first, last = part.bounds(sum(end - begin for begin, end in spans))
        found, before = [], 0
        for begin, end in spans:
            low, high = max(begin, begin + first - before), min(end, begin + last - before)
            if low < high:
                found.append((low, high))
            before += end - begin
        return found


class PackedRows:
    """Documents in shuffled order, one after the other, cut every `length` tokens.

    A document cut by a row's end goes on in the following row, as a document of its own to the model: positions restart
    and nothing is carried over. Every token of a pass is in exactly one row; only the last row can be shorter.
    """

    def __init__(self, pieces: Pieces, length: int, key: int) -> None:
        self._pieces, self._length, self._key = pieces, length, key
        self._tokens = int(pieces.lengths.sum())
        self.count = -(-self._tokens // length)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def spans(self, row: int, turn: int) -> Spans:
        order, ends = self._order(turn)
        begin = row * self._length
        stop = min(begin + self._length, self._tokens)
        place = int(np.searchsorted(ends, begin, side="right"))
        spans = []
        while begin < stop:
            document = order[place]
            skipped = begin - int(ends[place] - self._pieces.lengths[document])
            taken = min(stop, int(ends[place])) - begin
            first = int(self._pieces.begins[document]) + skipped
            spans.append((first, first + taken))
            begin, place = begin + taken, place + 1
        return spans

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        return np.minimum(self._tokens - rows * self._length, self._length)

    def _make_order(self, turn: int) -> tuple[Numbers, Numbers]:
        count = len(self._pieces.begins)
        documents = permute(np.arange(count), count, make_key(self._key, turn))
        return documents, np.cumsum(self._pieces.lengths[documents])


class SingleRows:
    """One document per row; a document longer than `length` becomes several rows."""

    def __init__(self, pieces: Pieces, length: int, key: int) -> None:
        self._pieces, self._length, self._key = pieces, length, key
        self._last = np.cumsum(-(-pieces.lengths // length))
        self.count = int(self._last[-1])

    def spans(self, row: int, turn: int) -> Spans:
        document, within = self._place(np.array([row]), np.array([turn]))
        begin = int(self._pieces.begins[document[0]] + within[0])
        end = int(self._pieces.begins[document[0]] + self._pieces.lengths[document[0]])
        return [(begin, min(begin + self._length, end))]

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        document, within = self._place(rows, turns)
        return np.minimum(self._pieces.lengths[document] - within, self._length)

    def _place(self, rows: Numbers, turns: Numbers) -> tuple[Numbers, Numbers]:
        """Document of each row and the tokens of it that come before."""
        shuffled = np.empty_like(rows)
        for turn in np.unique(turns):
            here = turns == turn
            shuffled[here] = permute(rows[here], self.count, make_key(self._key, int(turn)))
        document = np.searchsorted(self._last, shuffled, side="right")
        first = self._last[document] - -(-self._pieces.lengths[document] // self._length)
        return document, (shuffled - first) * self._length
