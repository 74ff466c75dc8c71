"""The `fault` marker's bookkeeping: each test belongs to a row of the fault matrix; the outcome of a run as JSON.

    @pytest.mark.fault(row=7)           # one mark per row that the test proves
    def test_...(fault_figure):
        fault_figure("flipped bits", 50)

`pytest -m fault --fault-report PATH` writes PATH; with pytest-xdist the workers' results arrive with their reports.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROWS = {
    1: "kill -9 while a checkpoint is written",
    2: "SIGTERM during a step",
    3: "SIGTERM twice, or during a save",
    4: "disk full during a save",
    5: "run folder that cannot be written",
    6: "truncated weights",
    7: "one flipped bit in the weights",
    8: "manifest missing or edited, file added, link out of the folder",
    9: "checkpoint of another configuration",
    10: "resume, same layout: bit for bit",
    11: "resume on another number of processes",
    12: "resume with another number of loader workers",
    13: "resume with changed data",
    14: "corrupt JSONL lines",
    15: "invalid UTF-8, BOM, CRLF, NUL, lone surrogates",
    16: "empty documents and files",
    17: "a line of 200 MB",
    18: "JSON too deep, integer too long, NaN",
    19: "data smaller than one batch",
    20: "loss that is not finite",
    21: "gradient that is not finite",
    22: "loss spike",
    23: "death of one process",
    24: "one process hangs",
    25: "death of a loader worker",
    26: "out of memory in a step",
    27: "malicious pickle, remote code, template escape",
    28: "malicious prune plan",
    29: "HTTP body too large",
    30: "HTTP body that is not valid",
    31: "sampling arguments out of range",
    32: "slow and idle HTTP clients",
    33: "HTTP client that disconnects, full queue",
    34: "HTTP authorisation and shutdown",
}
SECONDS = 240  # no fault test may take longer: a hang is a failure, not a wait
OPTION = "--fault-report"
Row = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, help="write the outcome of the fault tests, row by row, to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(OPTION) is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultReport(config.getoption(OPTION)), "fault-report")


def rows_of(item: pytest.Item) -> list[int]:
    """The rows a test proves; UsageError for a mark that names none of the matrix."""
    rows = [mark.kwargs.get("row") for mark in item.iter_markers("fault")]
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise pytest.UsageError(f"{item.nodeid}: fault(row=N) needs a row of {min(ROWS)} to {max(ROWS)}, not {unknown}")
    return sorted(rows)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.extend(("fault_row", row) for row in rows_of(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a fault test that outlives its time, with a traceback of where it waited."""
    if item.get_closest_marker("fault") is None:
        return (yield)

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid}: still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def fault_figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Record a figure of the test's rows: added up over the tests, or the largest where `largest` is said."""

    def record(name: str, value: float, largest: bool = False) -> None:
        request.node.user_properties.append(("fault_figure", [name, value, largest]))

    return record


class FaultReport:
    """Adds up the reports of all tests, from this process or from workers, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[int, Row] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = report.user_properties
        for row in (value for name, value in properties if name == "fault_row"):
            entry = self.rows.setdefault(row, _empty(row))
            entry["seconds"] += report.duration
            if report.when == "call" or report.outcome != "passed":  # a failed set-up or tear-down counts too
                entry["tests"] += 1
                entry[report.outcome] += 1
                entry["functions"].add(report.nodeid.split("[")[0])
            if report.when == "call":
                for name, figure in properties:
                    if name == "fault_figure":
                        _add(entry["figures"], *figure)

    def pytest_sessionfinish(self) -> None:
        from benchmarks.machine import commit, describe

        rows = {str(row): _plain(entry) for row, entry in sorted(self.rows.items())}
        content = {"machine": describe(), "commit": commit(), "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _empty(row: int) -> Row:
    counts = dict.fromkeys(("tests", "passed", "failed", "skipped"), 0)
    return {"title": ROWS[row], **counts, "seconds": 0.0, "figures": {}, "functions": set()}


def _add(figures: dict[str, float], name: str, value: float, largest: bool) -> None:
    figures[name] = max(figures.get(name, value), value) if largest else figures.get(name, 0) + value


def _plain(entry: Row) -> Row:
    figures = {name: round(value, 2) for name, value in sorted(entry["figures"].items())}
    return {**entry, "seconds": round(entry["seconds"], 1), "figures": figures, "functions": sorted(entry["functions"])}
