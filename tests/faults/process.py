"""Processes to kill: each is forked from one that has imported everything, so that a start costs no seconds.

What runs in them is the command line's own `main`, exactly as `python -m fusiontree …` calls it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import pytest

from fusiontree.cli.main import main

PATIENCE = 120.0  # seconds; a busy machine takes many times what an idle one does
ROOT = Path(__file__).resolve().parents[2]
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    ["fusiontree.train", "datasets", "fusiontree.eval.perplexity", "transformers.models.auto", __name__]
)

Prepare = Callable[[], None]


class Child:
    """`fusiontree WORDS` in a process of its own; `prepare` runs in it first and may set limits or traps.

    Its output goes to the file `out`. Leaving the `with` block kills it.
    """

    def __init__(self, words: Sequence[str | Path], out: Path, prepare: Prepare | None = None) -> None:
        self.out = out
        arguments = (list(map(str, words)), str(out), prepare)
        self.process = forks.Process(target=_run, args=arguments, daemon=True)

    def __enter__(self) -> Child:
        self.process.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.process.kill()
        self.process.join(PATIENCE)

    @property
    def output(self) -> str:
        """What it has written to standard output and standard error."""
        return self.out.read_text(encoding="utf-8") if self.out.exists() else ""

    def send(self, number: int) -> None:
        """Send a signal, unless it is over already."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code (negative: the signal that ended it); fails after `seconds`."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            pytest.fail(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    def until(self, met: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait until something is true; fails when the process ends first or the time is over."""
        deadline = time.monotonic() + seconds
        while not met():
            if self.process.exitcode is not None or time.monotonic() > deadline:
                pytest.fail(f"it never came to that; exit code {self.process.exitcode}:\n{self.output}")
            time.sleep(0.001)


def call(words: Sequence[str | Path], out: Path, prepare: Prepare | None = None) -> tuple[int, str]:
    """Exit code and output of a command that ends by itself."""
    with Child(words, out, prepare) as child:
        return child.wait(), child.output


def _run(words: list[str], out: str, prepare: Prepare | None) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a question on standard input would meet its end
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()
    sys.argv = ["fusiontree", *words]
    main()
