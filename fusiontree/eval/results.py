"""What an evaluation found: `results.json` in its folder, and the table on the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.journal import finite, write_whole
from fusiontree.eval.task import Scored

if TYPE_CHECKING:
    from rich.table import Table

FILE = "results.json"


class Results:
    """The results of one model in a folder: `model` says which, `tasks` holds a result per task, `groups` per family.

    ConfigError for a folder with the results of another model.
    """

    def __init__(self, folder: Path, model: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.model = dict(model)
        self.tasks: dict[str, Any] = {}
        self.groups: dict[str, Any] = {}
        if self.path.exists():
            self._read()

    def begin(self) -> None:
        """Say whose results will stand here, before the first of them."""
        if not self.path.exists():
            self._write()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            there, self.tasks, self.groups = (
                content["model"]["fingerprint"],
                content["tasks"],
                content.get("groups", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: not readable as results: {error}") from None
        if there != self.model["fingerprint"]:
            raise ConfigError(
                f"{self.path}: holds results of another model ({content['model'].get('name')}, {there}); this one is "
                f"{self.model['fingerprint']}; name another --out"
            )

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a task, in place of an earlier one."""
        self.tasks[name] = finite(result)
        self._write()

    def add_groups(self, groups: Mapping[str, Any]) -> None:
        """Keep what families of tasks come to."""
        if groups:
            self.groups.update(finite(groups))
            self._write()

    def _write(self) -> None:
        head = {"format": "fusiontree-evaluation", "version": 1}
        document = {**head, "model": self.model, "tasks": self.tasks, "groups": self.groups}
        write_whole(self.path, json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def spread(scored: Sequence[Scored]) -> dict[str, dict[str, float | int | None]]:
    """Mean, standard error of the mean and number of samples, for every score that all samples have."""
    names = set.intersection(*(set(each.scores) for each in scored)) if scored else set()
    return {name: mean_and_error([float(each.scores[name]) for each in scored]) for name in sorted(names)}


def mean_and_error(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of independent values and its standard error (None for a single one)."""
    count, mean = len(values), math.fsum(values) / len(values)
    error = None
    if count > 1:
        error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return {"mean": mean, "standard_error": error, "samples": count}


def results_table(title: str, tasks: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line per task and metric, the main metric first and in bold; below them the families of tasks."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("task", "metric", title=escape(title), title_justify="left", box=None, pad_edge=False)
    for head in ("value", "±", "samples"):
        table.add_column(head, justify="right")
    for name, result in tasks.items():
        main = result["main_metric"]
        ordered = sorted(result["metrics"].items(), key=lambda item: item[0] != main)
        for place, (metric, value) in enumerate(ordered):
            first = (escape(name), str(result["samples"])) if place == 0 else ("", "")
            shown = f"[bold]{number(value)}[/bold]" if metric == main else number(value)
            error = result.get("errors", {}).get(metric)
            table.add_row(first[0], escape(metric), shown, "" if error is None else number(error), first[1])
    for name, group in groups.items():
        for place, (metric, value) in enumerate(group["metrics"].items()):
            first = ("", "") if place else (f"all {name}", f"{len(group['tasks'])} of {group['of']} tasks")
            table.add_row(escape(first[0]), escape(metric), number(value), "", first[1])
    return table


def number(value: float | int | None) -> str:
    """Four digits and no exponent where it can be avoided."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
