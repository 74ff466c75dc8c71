"""RULER's headline: the mean over the tasks at each length, and the longest length that is still good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

GOOD = 85.6  # percent: Llama-2-7B at 4K, the threshold of the paper


def overall(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """From the summaries of RULER-style tasks by name: {"by_length": rows, "effective_length": length or None}.

    The effective length is the longest at which the mean over the tasks is above 85.6 %, lengths below it included.
    """
    scores: dict[int, list[float]] = defaultdict(list)
    for summary in summaries.values():
        for line in summary["tables"]["by_length"]:
            scores[line["length"]].append(line["score"])
    table = [
        {"length": length, "score": round(sum(values) / len(values), 2), "tasks": len(values)}
        for length, values in sorted(scores.items())
    ]
    effective = None
    for line in table:
        if line["score"] <= GOOD:
            break
        effective = line["length"]
    return {"by_length": table, "effective_length": effective}
