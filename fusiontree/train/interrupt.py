"""SIGTERM and Ctrl-C end a run between two steps, not in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopSignals:
    """While entered, SIGTERM and SIGINT only set `requested`; asked twice is asked once, so a save is never torn.

    `notice` is shown on standard error at the first signal: a step and a save can take a while.
    """

    def __init__(self, notice: str = "") -> None:
        self.requested = False
        self.notice = notice
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.notice and not self.requested:
            # Past Python's streams, which may be in the middle of a write of their own.
            os.write(2, f"\n{self.notice}\n".encode())
        self.requested = True

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
