"""Row 1, the whole road: a real run killed at random moments ends in the very weights of the run never killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.process import PATIENCE, ROOT, Child, call
from tests.faults.real_run import STEPS, outcome, write_config

STEP_SECONDS = 0.05


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = call(["train", write_config(folder / "run")], folder / "out.txt")
    assert code == 0, output
    return outcome(folder / "run")


def train_until_killed(config: Path, out: Path, moment: float) -> bool:
    """Start or go on, and kill `moment` steps later, part of a step included; whether it came before the end."""
    with Child(["train", config], out) as child:
        deadline = time.monotonic() + PATIENCE
        while child.output.count("  loss ") < int(moment) and child.process.is_alive():
            assert time.monotonic() < deadline, child.output
            time.sleep(0.001)
        time.sleep(moment % 1 * STEP_SECONDS)
        child.send(signal.SIGKILL)
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.output
    return code != 0


@pytest.mark.fault(row=1)
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_a_random_moment_ends_in_the_same_weights(
    tmp_path: Path, whole: dict[str, Any], number: int, fault_figure: Callable[..., None]
) -> None:
    config, out = write_config(tmp_path / "run"), tmp_path / "out.txt"
    assert train_until_killed(config, out, random.Random(number).uniform(0, STEPS - 1))
    code, output = call(["train", config], out)
    assert code == 0, output
    assert outcome(tmp_path / "run") == whole
    fault_figure("runs killed once, same final weights", 1)


@pytest.mark.fault(row=1)
def test_a_run_killed_again_and_again_ends_in_the_same_weights(
    tmp_path: Path, whole: dict[str, Any], fault_figure: Callable[..., None]
) -> None:
    config, out, draw, kills = write_config(tmp_path / "run"), tmp_path / "out.txt", random.Random(0), 0
    while kills < 20 and train_until_killed(config, out, draw.uniform(0, 6)):
        kills += 1
    code, output = call(["train", config], out)
    assert code == 0, output
    assert outcome(tmp_path / "run") == whole
    assert kills >= 8
    fault_figure("kills of one and the same run", kills, largest=True)


@pytest.mark.fault(row=1)
def test_the_same_through_the_shell(tmp_path: Path, whole: dict[str, Any]) -> None:
    """`python -m fusiontree train`, started anew each time, two kills."""
    config = write_config(tmp_path / "run")
    command = [sys.executable, "-m", "fusiontree", "train", str(config)]
    for step in (4, 20):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while last_step(tmp_path / "run") < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    assert outcome(tmp_path / "run") == whole


def last_step(run_dir: Path) -> int:
    """The last step in the metrics, 0 without any."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole_lines = text.split("\n")[:-1]
    return json.loads(whole_lines[-1])["step"] if whole_lines else 0
