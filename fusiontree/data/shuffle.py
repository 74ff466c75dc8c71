"""Counter-based shuffle: the place of any index in a permutation, without computing the others or keeping state."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
ROUNDS = 6
MASK = (1 << 64) - 1


def make_key(*numbers: int) -> int:
    """One 64-bit key from several numbers, such as (seed, source, epoch)."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(indices: npt.ArrayLike, size: int, key: int) -> Numbers:
    """Images of `indices` (each in [0, size)) under the permutation of range(size) that `key` names.

    A Feistel network over the next power of four; an image outside range(size) is sent through again until it is inside
    ("cycle walking", Black and Rogaway 2002), which keeps the map one to one.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.array(indices, dtype=np.uint64).reshape(-1)
    pending = np.arange(len(values))
    while len(pending):
        walked = _feistel(values[pending], half, key)
        values[pending] = walked
        pending = pending[walked >= size]
    return values.astype(np.int64)


def _feistel(values: Words, half: int, key: int) -> Words:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ np.uint64(make_key(key, turn))) & mask)
    return (left << shift) | right


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Draw:
    """Numbers drawn one after the other from a key (splitmix64); the same on every machine and in every version."""

    def __init__(self, key: int) -> None:
        self._state = key & MASK

    def next(self) -> int:
        """64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & MASK
        word = self._state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        return word ^ (word >> 31)

    def below(self, bound: int) -> int:
        """A number in [0, bound), all alike (to 2^-64 × bound)."""
        return (self.next() * bound) >> 64
