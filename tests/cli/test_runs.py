"""`fusiontree runs` through the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import Call


def test_runs_are_a_table_or_json(call: Call, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "one")
    (tmp_path / "[red]two").mkdir()
    shown = call("runs", tmp_path)
    assert shown.exit_code == 0, shown.output
    heads, *rows = shown.stdout.splitlines()
    assert heads.split() == ["run", "state", "step", "loss", "best", "val.", "tokens", "time", "changed", "size"]
    assert {row.split()[0] for row in rows} == {"one", "[red]two"}
    line = next(row for row in rows if row.startswith("one"))
    assert " finished " in line and " 4 / 4 " in line
    content = {row["name"]: row for row in json.loads(call("runs", tmp_path, "--json").stdout)}
    assert content["[red]two"]["state"] == "not a run" and content["[red]two"]["loss"] is None
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert content["one"]["loss"] == summary["final_loss"]
    assert content["one"]["best_validation_loss"] == summary["best"]["validation_loss"]
    assert f"{content['one']['best_validation_loss']:.4f}" in line


def test_an_empty_folder_says_so(call: Call, tmp_path: Path) -> None:
    assert call("runs", tmp_path).stdout.replace("\n", "") == f"no runs in {tmp_path}"
    assert call("runs", tmp_path, "--json").stdout == "[]\n"


def test_the_list_does_not_wait_for_torch(run: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fusiontree.cli.main import app\n"
        f"done = CliRunner().invoke(app, ['runs', {str(run)!r}])\nassert done.exit_code == 0, done.output\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
