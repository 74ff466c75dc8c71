"""States of texts that were read before, for prompts that begin alike: kept by bytes, the longest unused go first."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusiontree.deploy.slots import Parts
from fusiontree.models.cache import HybridCache
from fusiontree.models.config import HybridConfig

Gates = tuple[float | None, ...]


@dataclass(frozen=True)
class Snapshot:
    """The exact state after `tokens`. Nobody writes to its tensors."""

    tokens: np.ndarray  # int32
    parts: Parts
    logits: Tensor | None = None
    """(1, V) for the next token, where they were computed."""
    gates: Gates | None = None
    """Of the last token, where they were watched."""

    @property
    def nbytes(self) -> int:
        """Bytes of all it holds."""
        tensors = [t for part in self.parts for t in part.values() if t is not None]
        tensors += [] if self.logits is None else [self.logits]
        return int(self.tokens.nbytes) + sum(t.numel() * t.element_size() for t in tensors)

    def cache(self, config: HybridConfig) -> HybridCache:
        """A cache that goes on from here and leaves the snapshot as it is."""
        cache, seen = HybridCache(config), len(self.tokens)
        for layer, parts in zip(cache.layers, self.parts, strict=True):
            # Attention buffers copy what they are given; states and counters are replaced, never written to.
            layer.set_parts(dict(parts), seen, dense=True)
        return cache


def snapshot(tokens: Sequence[int], parts: Parts, logits: Tensor | None = None, gates: Gates | None = None) -> Snapshot:
    """Copy the state of one text, batch size 1, into tensors of its own."""
    copied = [{name: None if t is None else _copy(t) for name, t in part.items()} for part in parts]
    return Snapshot(np.asarray(tokens, np.int32), copied, None if logits is None else _copy(logits), gates)


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


class PrefixCache:
    """Snapshots by the tokens they have seen. Not for several threads at once.

    `hits` counts the lookups that found one. `max_bytes` 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self._entries: OrderedDict[bytes, Snapshot] = OrderedDict()  # the longest unused first
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: Snapshot) -> None:
        """Keep a snapshot; the longest unused make room. One that is too large by itself is not kept."""
        size = entry.nbytes
        if size > self.max_bytes:
            return
        key = _digest(entry.tokens)
        if key in self._entries:
            self._drop(key)
        while self.nbytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        self._lengths[len(entry.tokens)] += 1
        self.nbytes += size

    def longest(self, tokens: Sequence[int], whole: bool) -> Snapshot | None:
        """The snapshot that has seen the most of `tokens` from their beginning.

        One that has seen all of them serves only if its logits are known, and with `whole` its gates too.
        """
        ids = np.asarray(tokens, np.int32)
        digests = self._digests(ids)
        for length in sorted(digests, reverse=True):
            entry = self._entries.get(digests[length])
            if entry is None or not np.array_equal(entry.tokens, ids[:length]):
                continue
            if length == len(ids) and (entry.logits is None or (whole and entry.gates is None)):
                continue
            self._entries.move_to_end(digests[length])
            self.hits += 1
            return entry
        return None

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether there is a snapshot after exactly these tokens."""
        return _digest(np.asarray(tokens, np.int32)) in self._entries

    def branch(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` begin some known text too: where a state would serve both."""
        ids = np.asarray(tokens, np.int32)
        return max((_common(entry.tokens, ids) for entry in self._entries.values()), default=0)

    def _digests(self, ids: np.ndarray) -> dict[int, bytes]:
        """Of each beginning of `ids` that is as long as some snapshot."""
        state, begin, found = hashlib.blake2b(digest_size=16), 0, {}
        for length in sorted(self._lengths):
            if length > len(ids):
                break
            state.update(ids[begin:length].tobytes())
            begin = length
            found[length] = state.copy().digest()
        return found

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.nbytes -= entry.nbytes
        self._lengths[len(entry.tokens)] -= 1
        if not self._lengths[len(entry.tokens)]:
            del self._lengths[len(entry.tokens)]


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    different = np.nonzero(a[:size] != b[:size])[0]
    return int(different[0]) if len(different) else size
