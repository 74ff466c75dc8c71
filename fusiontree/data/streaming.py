"""Streaming sources: text read from front to back through Hugging Face `datasets`, tokenised and packed on the way.

Nothing is kept on disk and nothing is known in advance: not the number of documents, so a mixture needs weights, and no
place can be reached without what is before it, so a stream saves its own state. The state is small: where `datasets`
stood (its own state_dict) when the current batch of documents began, and how many of that batch's tokens are used. A
resume reads this one batch again. Documents are shuffled within their batch, by its number, so the order comes out the
same with no shuffle buffer to save; the buffer of `datasets` itself loses its content at a resume and is not used.

On several ranks each one reads the stream whole and keeps its own rows: for many ranks prepare the text instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

import numpy as np

from fusiontree.data.config import SourceConfig
from fusiontree.data.hub import document_of, open_stream
from fusiontree.data.records import BadRecords
from fusiontree.data.rows import WHOLE, Part
from fusiontree.data.shuffle import Numbers, make_key, permute
from fusiontree.data.store import Tokens
from fusiontree.errors import DataError

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 8_000_000
ENDLESS = 1 << 40
State = dict[str, Any]
EncodeAll = Callable[[list[str]], list[list[int]]]


class TextStream:
    """The usable documents of a source, batch after batch, over and over; a batch can be read again from its state."""

    def __init__(self, source: SourceConfig, key: int) -> None:
        self._source, self._key = source, key
        self.bad_records = BadRecords()
        self.restore({"pass": 0, "batch": 0, "record": 0, "dataset": None, "counts": [0, 0, 0, 0]})

    def state(self) -> State:
        """Where the next batch begins, as JSON values."""
        bad, dataset = self.bad_records, self._loaded
        if self._read_since:  # before that, datasets would not say what it was given
            dataset = json.loads(json.dumps(self._data.state_dict()))
        counts = [bad.documents, bad.count, bad.short, bad.mended]
        return {"pass": self._pass, "batch": self._batch, "record": self._record, "dataset": dataset, "counts": counts}

    def restore(self, state: State) -> None:
        """Go on where `state` was taken."""
        self._pass, self._batch, self._record = state["pass"], state["batch"], state["record"]
        bad = self.bad_records
        bad.documents, bad.count, bad.short, bad.mended = state["counts"]
        self._loaded, self._read_since = state["dataset"], False
        self._data = open_stream(self._source)
        if state["dataset"] is not None:
            self._data.load_state_dict(state["dataset"])
        self._records = iter(self._data)

    def next_batch(self) -> list[str]:
        """The next documents, shuffled; after the last the first come again. DataError when too much is bad."""
        texts, bad = self.documents(), self.bad_records
        if not texts or bad.documents + bad.count >= BATCH_DOCUMENTS:
            bad.check(self._source.path, self._source.max_bad_fraction)
        if not texts:
            self.restore({**self.state(), "pass": self._pass + 1, "batch": 0, "record": 0, "dataset": None})
            texts = self.documents()
        self._batch += 1
        order = permute(np.arange(len(texts)), len(texts), make_key(self._key, self._pass, self._batch))
        return [texts[index] for index in order]

    def documents(self, most: int | None = None) -> list[str]:
        """The usable documents of a batch, at most so many, in their own order; none when the source is at its end."""
        texts: list[str] = []
        characters, most = 0, BATCH_DOCUMENTS if most is None else min(most, BATCH_DOCUMENTS)
        while len(texts) < most and characters < BATCH_CHARACTERS:
            record = self._next_record()
            if record is None:
                break
            text = document_of(record, self._record, self._source, self.bad_records)
            if text is not None:
                self.bad_records.documents += 1
                texts.append(text)
                characters += len(text)
        return texts

    def _next_record(self) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] | None = next(self._records, None)
        except DataError:
            raise
        except Exception as error:  # datasets and what it reads with raise many types, none of them documented
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{self._source.path}: cannot be read after record {self._record}: {reason}") from error
        self._record, self._read_since = self._record + 1, True
        return record


class StreamRows:
    """Rows of a stream's documents, one after the other, each cut off where the row before ended. Safe for threads."""

    count = ENDLESS

    def __init__(self, stream: TextStream, encode: EncodeAll, eos: int, length: int) -> None:
        self.stream, self._encode, self._eos, self._length = stream, encode, eos, length
        self._lock = Lock()
        self._begin(0, stream.state(), 0)

    def read(self, row: int, turn: int, part: Part = WHOLE) -> list[Tokens]:
        """The stretches of documents in a part of a row; rows before the newest `release` are gone."""
        with self._lock:
            self._reach(row + 1)
            if row not in self._rows:
                raise DataError(f"row {row} of a stream is asked for again, which cannot be: it goes forward only")
            documents = self._rows[row]
        first, last = part.bounds(self._length)
        bounds = np.cumsum([0, *(len(tokens) for tokens in documents)])
        clipped = [
            tokens[max(first - begin, 0) : max(last - begin, 0)]
            for begin, tokens in zip(bounds[:-1], documents, strict=True)
        ]
        return [tokens for tokens in clipped if len(tokens)]

    def lengths(self, rows: Numbers, turns: Numbers) -> Numbers:
        """Every row is full."""
        return np.full(len(rows), self._length)

    def origins(self, row: int, turn: int, part: Part = WHOLE) -> list[str]:
        """The name of the stream: it keeps no account of single documents."""
        return [f"stream:{row}"]

    def state_at(self, row: int) -> State:
        """What `restore` needs to go on at a row."""
        with self._lock:
            self._reach(row)
            return self._starts[row] if row in self._starts else self._start()

    def restore(self, row: int, state: State) -> None:
        """Go on at a row, read from the state that `state_at` gave for it."""
        with self._lock:
            used = state["used"]
            self.stream.restore({name: value for name, value in state.items() if name != "used"})
            self._begin(row, self.stream.state(), used)

    def release(self, row: int) -> None:
        """Rows before this one will not be asked for again."""
        with self._lock:
            for old in [number for number in self._rows if number < row]:
                del self._rows[old], self._starts[old]

    def _begin(self, row: int, state: State, used: int) -> None:
        self._rows: dict[int, list[Tokens]] = {}
        self._starts: dict[int, State] = {}
        self._next, self._before, self._used = row, state, used
        self._documents: list[Tokens] | None = None

    def _reach(self, row: int) -> None:
        """Make rows until `row` is the next."""
        while self._next < row:
            self._starts[self._next] = self._start()
            self._rows[self._next] = list(self._take(self._length))
            self._next += 1

    def _start(self) -> State:
        """The state of the next row; a batch that is used up is left behind first."""
        if self._documents is not None and self._used == self._ends[-1]:
            self._documents, self._before, self._used = None, self.stream.state(), 0
        return {**self._before, "used": int(self._used)}

    def _take(self, room: int) -> Iterator[Tokens]:
        while room:
            self._start()
            if self._documents is None:
                ids = self._encode(self.stream.next_batch())
                self._documents = [np.array([*tokens, self._eos], dtype=np.int64) for tokens in ids]
                self._ends = np.cumsum([len(tokens) for tokens in self._documents])
            place = int(np.searchsorted(self._ends, self._used, side="right"))
            tokens = self._documents[place]
            begin = self._used - int(self._ends[place]) + len(tokens)
            taken = tokens[begin : begin + room]
            self._used += len(taken)
            room -= len(taken)
            yield taken
