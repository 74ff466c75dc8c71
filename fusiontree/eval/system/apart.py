"""Work in a process of its own, forked from a server in which the libraries are loaded but nothing has run."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar

from fusiontree.data.workers import end_with_parent
from fusiontree.errors import FusionTreeError

Value = TypeVar("Value")
LEAVING_SECONDS = 10  # to tidy up behind the result; an interrupted process is ended at once


class ProcessDiedError(Exception):
    """The process was ended from outside before it had a result."""


def in_fresh_process(work: Callable[..., Value], *arguments: Any) -> Value:
    """`work(*arguments)` in a new process; both and the result are sent through a pipe.

    Raises the FusionTreeError that the work raises, ProcessDiedError when the process is killed, and RuntimeError
    with the traceback for anything else.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__package__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        value, error, trace = receiver.recv()
        process.join(LEAVING_SECONDS)
    except EOFError:
        process.join()
        raise ProcessDiedError(f"the process ended with {_ending(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise error
    if trace is not None:
        raise RuntimeError(f"in a process of its own:\n{trace}")
    result: Value = value
    return result


def _work(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    Thread(target=end_with_parent, daemon=True).start()
    try:
        sender.send((work(*arguments), None, None))
    except FusionTreeError as error:
        sender.send((None, error, None))
    except Exception:  # whatever it is, the parent raises it
        sender.send((None, None, traceback.format_exc()))


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
