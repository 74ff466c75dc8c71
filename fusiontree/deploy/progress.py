"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ProgressFn = Callable[[int, int, str], None]
"""Called with (steps done, steps in all or 0 where that is not known, what was just done)."""

SECONDS_BETWEEN_LINES = 5.0


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""


@contextlib.contextmanager
def console_progress(title: str, console: Console | None = None) -> Iterator[ProgressFn]:
    """Yield a progress function that draws on `console` (standard error when not given)."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(title, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, text: bar.update(task, completed=done, total=total or None, note=text)


def _plain_lines(title: str, console: Console) -> ProgressFn:
    last = -SECONDS_BETWEEN_LINES

    def show(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or 0 < total <= done:
            console.print(f"{title} {done}{f'/{total}' if total else ''} {text}", highlight=False, markup=False)
            last = now

    return show
