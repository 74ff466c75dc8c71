"""Worker processes for long work in many tasks: progress, an account of where each stands, and no orphans."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from fusiontree.errors import DataError

POLL_SECONDS = 0.5
PLACE_BYTES = 300
Advance = Callable[[int], None]
At = Callable[[str], None]
Work = Callable[[Any, Advance, At], None]
"""Does a task, tells the bytes done since, and says where (`file:line`) it stands."""
_here: dict[str, Any] = {}


def in_processes(work: Work, tasks: Sequence[Any], workers: int, advance: Advance) -> None:
    """Do all tasks. Raises what a task raises, or DataError that says where the workers stood when one died."""
    # Forked from here, a child would inherit locks of the tokenizer's threads; a fresh one would import for seconds.
    context = get_context("forkserver")
    context.set_forkserver_preload(["fusiontree.data"])
    # Without locks, which a worker that is killed would take with it; each writes to places of its own.
    done, stop = context.Array("q", workers, lock=False), context.Value("b", 0, lock=False)
    places: list[Any] = [context.Array("c", PLACE_BYTES, lock=False) for _ in range(workers)]
    with ProcessPoolExecutor(workers, context, _start, (work, context.Value("i", 0), done, places, stop)) as pool:
        try:
            _follow([pool.submit(_do, task) for task in tasks], done, advance)
        except BrokenProcessPool:
            stood = [f"worker {number} at {place.value.decode()}" for number, place in enumerate(places) if place.value]
            raise DataError(
                f"a worker process died ({'; '.join(stood) or 'none had begun'}); run the same command again: it keeps "
                "the parts that are done"
            ) from None
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


def _follow(futures: Sequence[Future[None]], done: Any, advance: Advance) -> None:
    """Wait for all, telling the progress; the first error ends it."""
    told, pending = 0, set(futures)
    while pending:
        finished, pending = wait(pending, POLL_SECONDS)
        for future in finished:
            future.result()
        now = sum(done)
        advance(now - told)
        told = now


def _start(work: Work, started: Any, done: Any, places: Sequence[Any], stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with started.get_lock():
        number = started.value
        started.value += 1
    _here.update(work=work, number=number, done=done, place=places[number], stop=stop)


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Any) -> None:
    def advance(size: int) -> None:
        if _here["stop"].value:
            raise KeyboardInterrupt
        _here["done"][_here["number"]] += size

    def at(place: str) -> None:
        _here["place"].value = place.encode(errors="replace")[-PLACE_BYTES + 1 :]

    _here["work"](task, advance, at)
