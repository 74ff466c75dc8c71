"""The order of samples: from a global sample index to (source, row), for any mixture of sources.

An *epoch* has as many samples as all sources have rows. Without weights it holds each row of each source once. With
weights a source fills its share of the epoch and goes through its own rows at its own pace: whatever the weights, a row
comes again only after every other row of its source has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fusiontree.data.rows import Reader
from fusiontree.data.shuffle import Numbers, make_key, permute
from fusiontree.errors import DataError

POOL, BLOCK, CYCLE = 4096, 64, 4096


class Place(NamedTuple):
    """Row `row` of the pass `turn` over source number `source`."""

    source: int
    row: int
    turn: int


class Mixture:
    """Rows of several sources in one endless order that `key` names; bucketed: neighbours have similar lengths."""

    def __init__(self, sources: Sequence[Reader], weights: Sequence[float] | None, key: int, bucketed: bool) -> None:
        self._sources, self._key, self._bucketed = sources, key, bucketed
        self._counts = np.array(_shares([rows.count for rows in sources], weights))
        self._ends = np.cumsum(self._counts)
        self.size = int(self._ends[-1])
        self._order = lru_cache(maxsize=2)(self._make_order)

    def place(self, sample: int) -> Place:
        """Where a sample (any number from 0) comes from."""
        epoch, index = divmod(sample, self.size)
        source, row, turn = self._resolve(np.array([self._slot(epoch, index)]), epoch)
        return Place(int(source[0]), int(row[0]), int(turn[0]))

    def _slot(self, epoch: int, index: int) -> int:
        if self._bucketed:
            return int(self._order(epoch)[index])
        return int(permute(index, self.size, make_key(self._key, epoch))[0])

    def _resolve(self, slots: Numbers, epoch: int) -> tuple[Numbers, Numbers, Numbers]:
        source = np.searchsorted(self._ends, slots, side="right")
        drawn = (epoch + 1) * self._counts[source] - (self._ends[source] - slots)
        counts = np.array([rows.count for rows in self._sources])[source]
        return source, drawn % counts, drawn // counts

    def _make_order(self, epoch: int) -> Numbers:
        """Slots of an epoch such that neighbours have similar lengths.

        The shuffled slots are sorted by length within pools of 4,096, cut into blocks of 64, and the blocks shuffled.
        The batch size plays no part, so the order stays the same when it changes.
        """
        places = np.arange(self.size)
        slots = permute(places, self.size, make_key(self._key, epoch))
        slots = slots[np.lexsort((self._lengths(slots, epoch), places // POOL))]
        blocks = -(-self.size // BLOCK)
        turn = permute(np.arange(blocks), blocks, make_key(self._key, epoch, 1))
        return slots[np.argsort(turn[places // BLOCK], kind="stable")]

    def _lengths(self, slots: Numbers, epoch: int) -> Numbers:
        source, row, turn = self._resolve(slots, epoch)
        lengths = np.zeros(len(slots), dtype=np.int64)
        for number, rows in enumerate(self._sources):
            here = source == number
            lengths[here] = rows.lengths(row[here], turn[here])
        return lengths


class Interleave:
    """The endless order of a mixture with streams: every source's rows come from its first on, in order.

    Each cycle of 4,096 samples holds every source's share of them, shuffled. Weights are relative.
    """

    size = CYCLE

    def __init__(self, sources: Sequence[Reader], weights: Sequence[float], key: int) -> None:
        self._counts, self._key = [rows.count for rows in sources], key
        bounds = np.round(np.cumsum([0.0, *weights]) / sum(weights) * CYCLE).astype(np.int64)
        self._ends, self._shares = bounds[1:], np.diff(bounds)
        if not self._shares.all():
            raise DataError(f"data.train: a weight is less than 1 of {CYCLE} rows; the source would never be read")
        self._order = lru_cache(maxsize=2)(self._make_order)

    def place(self, sample: int) -> Place:
        """Where a sample (any number from 0) comes from."""
        source = int(self._order(sample // CYCLE)[sample % CYCLE])
        turn, row = divmod(self.drawn_before(source, sample), self._counts[source])
        return Place(source, row, turn)

    def drawn_before(self, source: int, sample: int) -> int:
        """Rows of a source among the samples before this one."""
        cycle, index = divmod(sample, CYCLE)
        return cycle * int(self._shares[source]) + int(np.count_nonzero(self._order(cycle)[:index] == source))

    def _make_order(self, cycle: int) -> Numbers:
        slots = permute(np.arange(CYCLE), CYCLE, make_key(self._key, cycle))
        return np.searchsorted(self._ends, slots, side="right")


def _shares(rows: list[int], weights: Sequence[float] | None) -> list[int]:
    """Samples of each source per epoch, at least one."""
    if weights is None:
        return rows
    return [max(1, round(sum(rows) * weight / sum(weights))) for weight in weights]
