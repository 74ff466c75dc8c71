"""What a result was measured on, where results are kept, and the table in README.md made from them."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from fusiontree.eval import provenance

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
BEGIN, END = "<!-- results: written by the benchmarks -->", "<!-- end of results -->"


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """The parser every benchmark starts from."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one round: checks the script, measures nothing"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of FusionTree's preset")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    return parser


def set_threads(threads: int | None) -> None:
    """Use `threads`, or every core this process may run on, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def describe() -> dict[str, Any]:
    """The machine and the versions, as JSON."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        **provenance.machine(torch.device("cpu")),
        **versions,
        "transformers": transformers.__version__,
        "load_before": os.getloadavg()[0],
    }


def commit() -> str:
    """The checked-out commit, marked when the package or the benchmarks differ from it."""
    return provenance.commit("benchmarks/*.py") or "unknown"


def write_result(name: str, machine: dict[str, Any], settings: dict[str, Any], result: dict[str, Any]) -> None:
    """Write results/NAME.json and refresh the table; a --quick run writes nothing that could be taken for a result."""
    if settings.get("quick"):
        print(json.dumps(result, indent=2))
        print("--quick: nothing written")
        return
    RESULTS.mkdir(exist_ok=True)
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    head = {"benchmark": name, "command": command, "commit": commit(), "date": datetime.date.today().isoformat()}
    document = head | {"machine": machine, "settings": settings, "result": result}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    refresh_readme()


def refresh_readme() -> None:
    """Rewrite the part of README.md between the markers from what results/ holds."""
    readme = FOLDER / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    body = "\n\n".join(_section(document) for document in documents) or "No results yet."
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def _section(document: dict[str, Any]) -> str:
    machine = document["machine"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['cpu_flags'])}), {machine['threads']} threads"
    )
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    head = f"### {document['benchmark']}\n\n`{document['command']}` · {document['date']} · commit {document['commit']}"
    parts = [f"{head}\n{where}, {versions}", markdown_table(document["result"]["rows"])]
    return "\n\n".join(parts + document["result"].get("remarks", []))


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a column per key of the first row."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(_cell(row[head]) for head in heads)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
