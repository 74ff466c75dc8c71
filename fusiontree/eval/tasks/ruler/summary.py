"""RULER's headline: the mean over the tasks at each length, and the longest length that is still good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

GOOD = 85.6  # percent: Llama-2-7B at 4K, the threshold of the paper


def overall(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Over the results of RULER-style tasks by name: `score@LENGTH` and the effective length; a grid tasks × lengths.

    The effective length is the longest at which the mean over the tasks is above 85.6 %, lengths below it included;
    0 when there is none.
    """
    scores: dict[int, list[float]] = defaultdict(list)
    for summary in summaries.values():
        for line in summary["tables"]["by_length"]:
            scores[line["length"]].append(line["score"])
    lengths = sorted(scores)
    means = {length: round(fmean(scores[length]), 2) for length in lengths}
    good = list(takewhile(lambda length: means[length] > GOOD, lengths))
    metrics = {"effective_length": good[-1] if good else 0, **{f"score@{length}": means[length] for length in lengths}}
    table = [{"length": length, "score": means[length], "tasks": len(scores[length])} for length in lengths]
    return {"metrics": metrics, "tables": {"by_length": table, "grid": _grid(summaries, lengths)}}


def _grid(summaries: Mapping[str, Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    cells, counts = [], []
    for summary in summaries.values():
        lines = {line["length"]: line for line in summary["tables"]["by_length"]}
        cells.append([lines[length]["score"] if length in lines else None for length in lengths])
        counts.append([lines[length]["samples"] if length in lines else 0 for length in lengths])
    names = [name.partition(":")[2] for name in summaries]
    axes = {"row": "task", "rows": names, "column": "length", "columns": list(lengths)}
    return {"grid": "score", **axes, "cells": cells, "counts": counts}
