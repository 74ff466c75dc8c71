"""A results.json as a report reads it: by architecture, its runs in the order of the seeds, with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusiontree.lab.grid.folder import Content
from fusiontree.lab.grid.statistics import Estimate, of_seeds, of_windows, paired

Run = dict[str, Any]
KEY_SEED = "/seed-"


@dataclass(frozen=True)
class View:
    """What a grid came to so far."""

    content: Content

    @property
    def ablates(self) -> bool:
        return bool(self.content["kind"] == "ablate")

    @property
    def grid(self) -> Content:
        grid: Content = self.content["grid"]
        return grid

    @property
    def names(self) -> list[str]:
        """Architectures in the order in which the grid names them; what is compared with comes first."""
        return list(self.content["contenders"])

    def contender(self, name: str) -> Run:
        found: Run = self.content["contenders"][name]
        return found

    def runs(self, name: str) -> list[Run]:
        """Finished runs, by seed."""
        own = [run for run in self.content["runs"].values() if run["architecture"] == name]
        return sorted(own, key=lambda run: run["seed"])

    def turns(self, name: str) -> Run:
        found: Run = self.content["turns"].get(name, {})
        return found

    def why_missing(self, name: str) -> str:
        """Why there is no finished run."""
        failed = [why for key, why in self.content["failed"].items() if key.startswith(f"{name}{KEY_SEED}")]
        return failed[0] if failed else "not run yet"

    def estimate(self, name: str, read: Callable[[Run], Run]) -> Estimate | None:
        """Mean over the seeds of a figure with `loss` and `standard_error`; None where there is none."""
        found = [read(run) for run in self.runs(name)]
        values = [figures["loss"] for figures in found if figures.get("loss") is not None]
        return of_seeds(values, found[0]["standard_error"]) if values else None

    def loss(self, name: str) -> Estimate | None:
        """Validation loss in nats per token."""
        return self.estimate(name, lambda run: run["validation"])

    def loss_at(self, name: str, multiple: int) -> Estimate | None:
        """Loss in rows of so many times the training length; None where the model cannot read them."""
        return self.estimate(name, lambda run: run["by_length"].get(str(multiple), {}))

    def effect(self, name: str) -> Estimate | None:
        """Loss less that of the first architecture, run by run of the same seed; window by window where there is one.

        Seeds that only one of them has are left out.
        """
        own, first = ({run["seed"]: run["validation"] for run in self.runs(each)} for each in (name, self.names[0]))
        seeds = sorted(own.keys() & first.keys())
        if not seeds:
            return None
        if len(seeds) > 1:
            mean, error = paired([own[seed]["loss"] for seed in seeds], [first[seed]["loss"] for seed in seeds])
            return Estimate(mean, error, "seeds")
        mine, other = own[seeds[0]]["windows"], first[seeds[0]]["windows"]
        if mine["tokens"] != other["tokens"]:
            return Estimate(own[seeds[0]]["loss"] - first[seeds[0]]["loss"], None, "windows")
        difference = [a - b for a, b in zip(mine["nats"], other["nats"], strict=True)]
        mean, error = of_windows(difference, mine["tokens"])
        return Estimate(mean, error, "windows")

    def mean(self, name: str, read: Callable[[Run], Any]) -> float:
        """Mean over the seeds of a number; NaN where there is none."""
        values = [value for run in self.runs(name) if (value := read(run)) is not None]
        return math.fsum(values) / len(values) if values else math.nan
