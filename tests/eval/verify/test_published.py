"""docs/contract.md says what docs/contract.json holds, and that is about these lines and every model it speaks of."""

import json
import subprocess
import sys
from pathlib import Path

from fusiontree.eval.verify import LINES

ROOT = Path(__file__).resolve().parents[3]
RECORD = json.loads((ROOT / "docs" / "contract.json").read_text(encoding="utf-8"))
OURS = ("FusionTree", "FusionTree pre + cross", "our llama", "our mamba2")


def test_the_document_shows_the_record() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "contract.py")], capture_output=True, text=True, check=True, timeout=120
    )
    document = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 4 and not [table for table in tables if table not in document]


def test_the_record_is_about_these_lines() -> None:
    for findings in RECORD["models"].values():
        assert [(found["name"], found["claim"]) for found in findings] == [(line.name, line.claim) for line in LINES]


def test_ours_holds_in_every_line_that_could_be_measured() -> None:
    for name in OURS:
        status = {found["name"]: found["status"] for found in RECORD["models"][name]}
        missing = {line for line, each in status.items() if each != "holds"}
        assert missing <= {"device", "pruned"}, name
    assert len(RECORD["models"]) == 11
