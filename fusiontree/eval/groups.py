"""What a family's tasks come to together: the averages its authors publish, made from the results in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from statistics import fmean
from typing import Any

from fusiontree.eval.journal import finite
from fusiontree.eval.registry import FAMILIES, family


def group_results(
    families: Set[str], tasks: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """By family: {"metrics", "tables", "tasks": main metric, value and error by name, "of": how many the family has}.

    `tasks`: results by name. Only those asked with these settings count, `data` aside: a mean over others would have no
    meaning.
    """
    found, wanted = {}, finite(settings)
    for name in sorted(families & FAMILIES.keys()):
        group = family(name)
        some = {task: result for task, result in tasks.items() if task.startswith(f"{name}:")}
        some = {task: result for task, result in some.items() if _alike(result["settings"], wanted)}
        if group.overall is not None and some:
            found[name] = {
                **group.overall(some),
                "tasks": {task: _main(result) for task, result in some.items()},
                "of": len(group.members),
            }
    return found


def _main(result: Mapping[str, Any]) -> dict[str, Any]:
    metric = result["main_metric"]
    return {"metric": metric, "value": result["metrics"][metric], "error": result["errors"].get(metric)}


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {**one, "data": None} == {**other, "data": None}


def macro_average(scores: Mapping[str, float | None], categories: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """{"average": mean over the categories of the mean of their tasks, "categories": rows}; two decimals.

    `scores`: percent by task. A category without a score does not count; null when none has one.
    """
    known = {key: [s for name in names if (s := scores.get(name)) is not None] for key, names in categories.items()}
    means = {category: fmean(some) for category, some in known.items() if some}
    rows = [{"category": key, "score": round(mean, 2), "tasks": len(known[key])} for key, mean in means.items()]
    return {"average": round(fmean(means.values()), 2) if means else None, "categories": rows}
