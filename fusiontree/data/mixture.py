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

POOL, BLOCK = 4096, 64


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


def _shares(rows: list[int], weights: Sequence[float] | None) -> list[int]:
    """Samples of each source per epoch, at least one."""
    if weights is None:
        return rows
    return [max(1, round(sum(rows) * weight / sum(weights))) for weight in weights]
