"""The counter-based shuffle is one to one, random enough, and the same for ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data.shuffle import FEW, make_key, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_it_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_an_image_needs_no_other(size: int, key: int, data) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=2 * FEW))
    together = permute(indices, size, key)
    assert together.tolist() == permute(indices + [0] * FEW, size, key)[: len(indices)].tolist(), "arrays and integers"
    assert [int(permute(index, size, key)[0]) for index in indices] == together.tolist()
    assert all(0 <= image < size for image in together)


def test_neighbours_and_keys_are_unrelated() -> None:
    size = 10_000
    first, second = permute(np.arange(size), size, make_key(0, 0)), permute(np.arange(size), size, make_key(0, 1))
    for left, right in ((first, second), (first, np.arange(size)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.05
    assert np.bincount(first[:1000] // 1000).min() > 60


def test_the_order_never_changes_between_versions() -> None:
    assert make_key(1, 2) != make_key(2, 1) != make_key(21)
    assert permute(np.arange(10), 10, make_key(7)).tolist() == PINNED


PINNED = [7, 8, 0, 1, 6, 5, 3, 9, 4, 2]
