"""Batches prepared ahead by threads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Request = TypeVar("Request", bound=Hashable)
Result = TypeVar("Result")


class Ahead(Generic[Request, Result]):
    """Makes the first of the requests it is given and has the others prepared; what is no longer wanted is dropped."""

    def __init__(self, make: Callable[[Request], Result], pool: ThreadPoolExecutor) -> None:
        self._make, self._pool = make, pool
        self._pending: dict[Request, Future[Result]] = {}

    def __call__(self, wanted: Sequence[Request]) -> Result:
        self._pending = {
            request: self._pending.get(request) or self._pool.submit(self._make, request) for request in wanted
        }
        return self._pending.pop(wanted[0]).result()


@contextmanager
def prepared_by(workers: int, make: Callable[[Request], Result]) -> Iterator[Callable[[Sequence[Request]], Result]]:
    """A function that makes the first of some requests: with threads that work on the others, or (0) without."""
    if workers == 0:
        yield lambda wanted: make(wanted[0])
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="fusiontree-data") as pool:
        try:
            yield Ahead(make, pool)
        finally:
            pool.shutdown(cancel_futures=True)
