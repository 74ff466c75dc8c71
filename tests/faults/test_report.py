"""The report of the fault tests: rows, counts and figures, from one process or from several."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.faults.process import ROOT

pytest_plugins = ["pytester"]

TESTS = """
import time
import pytest

@pytest.mark.fault(row=1)
@pytest.mark.parametrize("kills", [2, 3])
def test_passes(kills, fault_figure):
    fault_figure("kills", kills)
    fault_figure("slowest", kills, largest=True)

@pytest.mark.fault(row=1)
@pytest.mark.fault(row=7)
def test_fails(fault_figure):
    assert not fault_figure("kills", 10)
    assert 0

@pytest.mark.fault(row=2)
@pytest.mark.skip(reason="not here")
def test_is_skipped():
    pass

def test_of_no_row():
    pass
"""


@pytest.mark.parametrize("processes", [[], ["-n", "2"]])
def test_rows_are_counted_and_figures_added_up(pytester: pytest.Pytester, processes: list[str]) -> None:
    pytester.makepyfile(test_it=TESTS)
    pytester.runpytest_inprocess("-p", "tests.faults.report", *processes, "--fault-report", "out/report.json")
    rows = json.loads((pytester.path / "out" / "report.json").read_text(encoding="utf-8"))["rows"]
    counts = {
        row: tuple(entry[name] for name in ("tests", "passed", "failed", "skipped")) for row, entry in rows.items()
    }
    assert counts == {"1": (3, 2, 1, 0), "2": (1, 0, 0, 1), "7": (1, 0, 1, 0)}
    assert rows["1"]["figures"] == {"kills": 15, "slowest": 3}
    assert rows["7"]["functions"] == ["test_it.py::test_fails"]


@pytest.mark.parametrize("mark", ["fault", "fault()", "fault(row=0)", "fault(row='7')"])
def test_a_mark_without_a_row_is_refused(pytester: pytest.Pytester, mark: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass\n")
    result = pytester.runpytest_inprocess("-p", "tests.faults.report")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_it: fault(row=N) needs a row of 1 to 34*"])


def test_a_test_that_hangs_is_ended(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.report.SECONDS", 1)
    pytester.makepyfile("import time, pytest\n@pytest.mark.fault(row=1)\ndef test_it(): time.sleep(30)\n")
    started = time.monotonic()
    pytester.runpytest_inprocess("-p", "tests.faults.report").assert_outcomes(failed=1)
    assert time.monotonic() - started < 20


def test_the_tables_of_the_document_are_what_the_result_says() -> None:
    """`python scripts/reliability_table.py --write` writes them."""
    script = ROOT / "scripts" / "reliability_table.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    document = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for table in done.stdout.strip().split("\n\n"):
        assert table in document


def test_the_result_in_the_document_covers_every_row_up_to_28_and_none_failed() -> None:
    rows = json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))["rows"]
    assert set(map(str, range(1, 29))) <= set(rows)
    assert all(row["tests"] == row["passed"] for row in rows.values())
