"""Progress of a whole grid: how many steps of how many, which run, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from fusiontree.deploy.progress import ProgressFn
from fusiontree.train import Callback, Snapshot


class GridProgress:
    """Counts steps; the time left is reckoned in FLOPs, of which a step has more in one architecture than another."""

    def __init__(self, show: ProgressFn, clock: Callable[[], float] = time.monotonic) -> None:
        self.show, self.clock = show, clock
        self.steps = self.steps_left = 0
        self.cost_left = self.cost_done = 0.0
        self.began: float | None = None

    def expect(self, steps: int, cost: float) -> None:
        """A run that is to come."""
        self.steps += steps
        self.steps_left += steps
        self.cost_left += cost

    def passed(self, steps: int, cost: float) -> None:
        """Steps that an earlier start had done already, or that are no longer to be done."""
        self.steps_left -= steps
        self.cost_left -= cost

    def step(self, label: str, cost: float) -> None:
        """One step was done."""
        now = self.clock()
        if self.began is None:  # the first step warms up
            self.began = now
        else:
            self.cost_done += cost
        self.passed(1, cost)
        self.say(f"{label}{self._time_left(now)}")

    def say(self, text: str) -> None:
        """Show what is done now."""
        self.show(max(0, self.steps - self.steps_left), self.steps, text)

    def _time_left(self, now: float) -> str:
        if self.began is None or self.cost_done <= 0:
            return ""
        seconds = round((now - self.began) * self.cost_left / self.cost_done)
        return f", about {seconds // 60}:{seconds % 60:02d} left"


class Ticker(Callback):
    """Tells the grid's progress about the steps of one run."""

    name = "grid_progress"

    def __init__(self, progress: GridProgress, label: str, cost_per_step: float) -> None:
        self.progress, self.label, self.cost = progress, label, cost_per_step
        self.done = 0

    def on_start(self, run: Snapshot) -> None:
        """Steps of an earlier start."""
        self.progress.passed(run.step, run.step * self.cost)
        self.progress.say(f"{self.label}: from step {run.step} of {run.steps}")

    def on_step(self, run: Snapshot) -> None:
        """One more."""
        self.done = run.step
        self.progress.step(f"{self.label}, step {run.step} of {run.steps}", self.cost)
