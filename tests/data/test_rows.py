"""Packing is a pure function that loses no token, repeats none, and never mixes documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data.mixture import Mixture
from fusiontree.data.rows import PackedRows, SingleRows
from fusiontree.data.splits import Pieces

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)
KEYS = st.integers(0, 2**32)


def pieces_of(lengths: list[int], gap: int = 0) -> Pieces:
    sizes = np.array(lengths, dtype=np.int64)
    return Pieces(np.cumsum(sizes + gap) - sizes, sizes)


def covered(spans: list[tuple[int, int]]) -> list[int]:
    return sorted(token for begin, end in spans for token in range(begin, end))


@pytest.mark.parametrize("kind", [PackedRows, SingleRows])
@given(lengths=LENGTHS, length=st.integers(2, 30), key=KEYS, turn=st.integers(0, 3), gap=st.integers(0, 2))
def test_every_token_is_in_exactly_one_row(kind, lengths, length, key, turn, gap) -> None:
    pieces = pieces_of(lengths, gap)
    rows = kind(pieces, length, key)
    spans = [span for row in range(rows.count) for span in rows.spans(row, turn)]
    assert covered(spans) == covered(list(zip(pieces.begins, pieces.begins + pieces.lengths, strict=True)))
    owners = [np.searchsorted(pieces.begins, [begin, end - 1], side="right") for begin, end in spans]
    assert all(first == last for first, last in owners), "a span crosses a document boundary"
    numbers = np.arange(rows.count)
    sizes = [sum(end - begin for begin, end in rows.spans(row, turn)) for row in numbers]
    assert rows.lengths(numbers, np.full(rows.count, turn)).tolist() == sizes


@given(lengths=LENGTHS, length=st.integers(2, 30), key=KEYS)
def test_packed_rows_are_full_but_for_the_last(lengths: list[int], length: int, key: int) -> None:
    rows = PackedRows(pieces_of(lengths), length, key)
    sizes = [sum(end - begin for begin, end in rows.spans(row, 0)) for row in range(rows.count)]
    assert sizes[:-1] == [length] * (rows.count - 1) and 0 < sizes[-1] <= length


@given(lengths=LENGTHS, length=st.integers(2, 30), key=st.integers(0, 99), row=st.integers(0, 10**6))
def test_a_row_needs_no_other_row(lengths: list[int], length: int, key: int, row: int) -> None:
    whole, single = PackedRows(pieces_of(lengths), length, key), PackedRows(pieces_of(lengths), length, key)
    all_rows = [whole.spans(number, 5) for number in range(whole.count)]
    assert single.spans(row % whole.count, 5) == all_rows[row % whole.count]


def test_documents_are_shuffled_anew_in_each_pass() -> None:
    rows = PackedRows(pieces_of([10] * 50), 10, key=3)
    orders = [[rows.spans(row, turn)[0][0] for row in range(50)] for turn in range(3)]
    assert orders[0] != orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[1])


def test_one_document_of_many_rows_goes_on_in_the_next_row() -> None:
    rows = PackedRows(pieces_of([23]), 10, key=0)
    assert [rows.spans(row, 0) for row in range(3)] == [[(0, 10)], [(10, 20)], [(20, 23)]]


@pytest.mark.parametrize("bucketed", [False, True])
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=4), key=KEYS, epoch=st.integers(0, 4))
def test_without_weights_an_epoch_is_each_row_of_each_source_once(bucketed, counts, key, epoch) -> None:
    sources = [SingleRows(pieces_of([3] * count), 4, key) for count in counts]
    mixture = Mixture(sources, None, key, bucketed)
    places = [mixture.place(sample) for sample in range(epoch * mixture.size, (epoch + 1) * mixture.size)]
    assert sorted((place.source, place.row) for place in places) == [
        (source, row) for source, count in enumerate(counts) for row in range(count)
    ]
    assert {place.turn for place in places} == {epoch}


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    key=st.integers(0, 99),
)
def test_with_weights_each_source_has_its_share_and_its_own_pace(
    counts: list[int], weights: list[float], key: int
) -> None:
    weights = weights[: len(counts)]
    mixture = Mixture([PackedRows(pieces_of([3] * n), 3, key) for n in counts], weights, key, bucketed=False)
    epochs = 3
    places = [mixture.place(sample) for sample in range(epochs * mixture.size)]
    for source, count in enumerate(counts):
        drawn = [(place.turn, place.row) for place in places if place.source == source]
        share = max(1, sum(counts) * weights[source] / sum(weights))
        assert abs(len(drawn) / epochs - share) <= 0.5
        assert sorted(drawn) == [divmod(number, count) for number in range(len(drawn))]


def test_bucketing_puts_equal_lengths_together_and_still_mixes() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, size=9000)
    rows = SingleRows(pieces_of(lengths.tolist()), 512, key=1)
    mixture = Mixture([rows], None, 1, bucketed=True)
    sizes = np.array([
        sum(end - begin for begin, end in rows.spans(mixture.place(sample).row, 0)) for sample in range(8192)
    ])  # fmt: skip
    batches = sizes.reshape(-1, 8)
    assert batches.sum() / (batches.max(axis=1) * 8).sum() > 0.97
    assert abs(np.corrcoef(np.arange(1024), batches.mean(axis=1))[0, 1]) < 0.3
