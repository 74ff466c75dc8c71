"""Work beside the caller's own: in order, really at the same time, errors not lost."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, current_thread

import pytest

from fusiontree.data.ahead import AHEAD, alongside


def test_items_keep_their_order_and_their_results() -> None:
    for count in (0, 1, AHEAD, 20):
        assert list(alongside(lambda item: item * item, range(count))) == [(item, item * item) for item in range(count)]


def test_work_goes_on_while_the_next_items_are_made() -> None:
    working = Event()

    def items() -> Iterator[int]:
        yield 1
        assert working.wait(30), "the work on the first item waits for the second"
        yield 2

    assert [item for item, _ in alongside(lambda item: working.set(), items())] == [1, 2]


def test_an_error_on_either_side_comes_out_and_ends_it() -> None:
    def broken() -> Iterator[int]:
        yield from (1, 0)
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        list(alongside(lambda item: item, broken()))
    with pytest.raises(ZeroDivisionError):
        list(alongside(lambda item: 1 // item, iter([1, 0, 1])))


def test_leaving_early_leaves_no_thread() -> None:
    threads = []
    for _ in alongside(lambda item: threads.append(current_thread()), range(100)):
        break
    assert threads and not any(thread.is_alive() for thread in threads)
