"""Writes the tables of docs/reliability.md from docs/reliability.json, which `make faults` writes.

python scripts/reliability_table.py          prints them
python scripts/reliability_table.py --write  puts them in the document, between its markers
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENT = DOCS / "reliability.md"
RESULT: dict[str, Any] = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))


def summary() -> Iterator[str]:
    """One sentence: how many rows, how many tests, how they ended, where."""
    rows = RESULT["rows"].values()
    counts = {name: sum(row[name] for row in rows) for name in ("passed", "failed", "skipped")}
    whole = sum(row["passed"] == row["tests"] for row in rows)
    machine = RESULT["machine"]
    yield (
        f"{whole} of {len(rows)} rows hold in all their tests: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped, where a test that proves two rows counts in both. "
        f"Commit {RESULT['commit']}; {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}."
    )


def table() -> Iterator[str]:
    """One line per row of the matrix."""
    yield "| row | fault | tests | passed | seconds | figures |"
    yield "|---:|---|---:|---:|---:|---|"
    for number, row in RESULT["rows"].items():
        figures = ", ".join(f"{name}: {value:,g}" for name, value in row["figures"].items())
        yield f"| {number} | {row['title']} | {row['tests']} | {row['passed']} | {row['seconds']:g} | {figures} |"


if __name__ == "__main__":
    main(DOCUMENT, {"summary": summary, "rows": table})
