"""One process at a time at a file or folder that is about to be made; a lock frees itself when its holder dies."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusiontree.errors import DataError

POLL_SECONDS, TOLD_SECONDS = 0.05, 5.0
logger = logging.getLogger(__name__)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target`.lock, which is there only meanwhile. Raises DataError when it cannot be made."""
    path = target.with_name(target.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise DataError(f"{target.parent}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """An open descriptor that holds the lock."""
    begin, told = time.monotonic(), False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _try(descriptor):
            return descriptor
        os.close(descriptor)
        if not told and time.monotonic() - begin > TOLD_SECONDS:
            logger.warning("%s: another process is making it; waiting", path.with_suffix(""))
            told = True
        time.sleep(POLL_SECONDS)


def _try(descriptor: int) -> bool:
    """Whether the lock is ours; one whose file its last holder took away guards nothing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0
