"""Work done ahead by threads: the batches that come next, and what goes on beside the caller's own work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import current_thread
from typing import Generic, TypeVar

Request = TypeVar("Request", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2
WORKER = "loader worker"


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
    with ThreadPoolExecutor(workers, thread_name_prefix=WORKER) as pool:
        try:
            yield Ahead(make, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def worker_name() -> str:
    """What the running thread is called in messages."""
    name = current_thread().name
    return name.replace("_", " ") if name.startswith(WORKER) else "loader"


def alongside(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in order; a thread works while the caller makes the next and uses the last."""
    with ThreadPoolExecutor(1, thread_name_prefix="fusiontree-data") as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
