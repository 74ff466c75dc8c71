"""Counter-based shuffle: the place of any index in a permutation, without computing the others or keeping state."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
ROUNDS = 6
FEW = 16  # numbers up to which plain integers are faster than arrays
MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


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
    if len(values) <= FEW:
        return np.array([_walk(value, size, half, key) for value in values.tolist()], dtype=np.int64)
    pending = np.arange(len(values))
    while len(pending):
        walked = _feistel(values[pending], half, key)
        values[pending] = walked
        pending = pending[walked >= size]
    return values.astype(np.int64)


def _feistel(values: Words, half: int, key: int) -> Words:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for round_key in _round_keys(key):
        left, right = right, left ^ (_mix(right ^ np.uint64(round_key)) & mask)
    return (left << shift) | right


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    words = words + np.uint64(GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(SECOND)
    return words ^ (words >> np.uint64(31))


def _walk(value: int, size: int, half: int, key: int) -> int:
    """`_feistel` of one number, until it is inside range(size)."""
    mask, round_keys = (1 << half) - 1, _round_keys(key)
    while True:
        left, right = value >> half, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix_one(((right ^ round_key) + GOLDEN) & MASK) & mask)
        value = (left << half) | right
        if value < size:
            return value


def _mix_one(word: int) -> int:
    """`_mix` of one word to which GOLDEN has been added."""
    word = ((word ^ (word >> 30)) * FIRST) & MASK
    word = ((word ^ (word >> 27)) * SECOND) & MASK
    return word ^ (word >> 31)


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(make_key(key, turn) for turn in range(ROUNDS))


class Draw:
    """Numbers drawn one after the other from a key (splitmix64); the same on every machine and in every version."""

    def __init__(self, key: int) -> None:
        self._state = key & MASK

    def next(self) -> int:
        """64 random bits."""
        self._state = (self._state + GOLDEN) & MASK
        return _mix_one(self._state)

    def below(self, bound: int) -> int:
        """A number in [0, bound), all alike (to 2^-64 × bound)."""
        return (self.next() * bound) >> 64
