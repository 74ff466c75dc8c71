"""Rows 11, 20, 21, 23 and 24 with two processes: they agree on bad numbers, and none waits for one that is gone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.process import PATIENCE, ROOT, call
from tests.faults.ranks import die_in_step, freeze_in_step, log_weights, started
from tests.faults.test_numbers import BAD, poison, weights_and_moments
from tests.train.tiny import lines, state_hashes, tiny_file

SETTINGS = {
    "logging__console": "plain",
    "training__save_every": 2,
    "training__validation_every": None,
    "system__engine": "ddp",
    "system__timeout": 60,
}
LOST = 5  # the step in which a process is lost; the newest checkpoint is that of step 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that lost none."""
    folder = tmp_path_factory.mktemp("whole")
    train_with_two(folder)
    return folder / "run"


def train_with_two(folder: Path) -> None:
    with started(tiny_file(folder, **SETTINGS), folder, [None, None]) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def assert_named(output: str, folder: Path, rank: int) -> None:
    """One line says who is gone and where to go on; the checkpoints are as they were."""
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert f"rank {rank} does not answer" in line and "step-00000004" in line and "start all again" in line, output
    assert checkpoints(folder) == ["step-00000002", "step-00000004"]


@pytest.mark.fault(row=23)
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_others_within_ten_seconds(
    tmp_path: Path, whole: Path, victim: int, fault_figure: Callable[..., None]
) -> None:
    prepares = [partial(die_in_step, LOST) if rank == victim else None for rank in range(2)]
    with started(tiny_file(tmp_path, **SETTINGS), tmp_path, prepares) as ranks:
        survivor = ranks[1 - victim]
        assert ranks[victim].wait() == -signal.SIGKILL
        begun = time.monotonic()
        code = survivor.wait()
        seconds = time.monotonic() - begun
        assert code == 2, survivor.output
        assert_named(survivor.output, tmp_path, victim)
    assert seconds < 10
    train_with_two(tmp_path)
    assert state_hashes(tmp_path / "run") == state_hashes(whole) != {}
    assert lines(tmp_path / "run") == lines(whole)
    fault_figure("seconds until the other process had ended", seconds, largest=True)


@pytest.mark.fault(row=23)
def test_under_torchrun_too_the_lost_process_is_named(tmp_path: Path) -> None:
    config = tiny_file(tmp_path, **{**SETTINGS, "training__steps": 4000})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as out:
        agent = subprocess.Popen([*command, "-m", "fusiontree", "train", str(config)], env=environment, cwd=ROOT,
                                 stdout=out, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
            assert agent.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text("utf-8")
            time.sleep(0.01)
        os.kill(process_of_rank(agent.pid, 1), signal.SIGKILL)
        begun = time.monotonic()
        assert agent.wait(PATIENCE) != 0
        seconds = time.monotonic() - begun
    finally:
        agent.kill()
        agent.wait(PATIENCE)
    output = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert "rank 1 does not answer" in output, output
    assert seconds < 20


def process_of_rank(agent: int, rank: int) -> int:
    """The process that an agent of torchrun started for a rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="utf-8").split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"none of {children} is rank {rank}")


@pytest.mark.fault(row=24)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_named_after_the_timeout_with_the_stacks(
    tmp_path: Path, victim: int, fault_figure: Callable[..., None]
) -> None:
    timeout = 5
    prepares = [partial(freeze_in_step, LOST) if rank == victim else None for rank in range(2)]
    with started(tiny_file(tmp_path, **{**SETTINGS, "system__timeout": timeout}), tmp_path, prepares) as ranks:
        survivor = ranks[1 - victim]
        survivor.until(lambda: (tmp_path / "run" / "checkpoints" / "step-00000004").exists())
        begun = time.monotonic()
        code = survivor.wait()
        seconds = time.monotonic() - begun
        assert code == 2, survivor.output
        assert_named(survivor.output, tmp_path, victim)
        assert "most recent call first" in survivor.output and "engine.py" in survivor.output
    assert timeout - 1 < seconds < timeout + 10
    fault_figure("seconds until a hang was told, of which 5 are the timeout", seconds, largest=True)


CASES = [
    *(pytest.param(engine, "loss", math.nan, marks=pytest.mark.fault(row=20)) for engine in ("ddp", "fsdp")),
    *(pytest.param(engine, "gradient", math.inf, marks=pytest.mark.fault(row=21)) for engine in ("ddp", "fsdp")),
    pytest.param("deepspeed", "gradient", math.nan, marks=pytest.mark.fault(row=21)),
]


@pytest.mark.parametrize(("engine", "where", "value"), CASES)
def test_both_processes_skip_a_step_that_is_bad_in_one(tmp_path: Path, engine: str, where: str, value: float) -> None:
    changes = {**SETTINGS, "training__save_every": 1, "training__max_skipped_steps": 2, "system__engine": engine}
    logs = [tmp_path / f"weights-{rank}.txt" for rank in range(2)]
    bad = partial(poison, where, BAD, value, 1)
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
        changes["system__deepspeed"] = str(tmp_path / "zero.json")
        (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    prepares = [None, bad] if engine != "ddp" else [partial(log_weights, logs[0]), partial(log_weights, logs[1], bad)]
    with started(tiny_file(tmp_path, **changes), tmp_path, prepares) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
        assert ranks[0].output.count("is not finite") == len(BAD), "the process without the bad number says so"
    states = {step: weights_and_moments(tmp_path, step) for step in range(1, 9)}
    assert {step for step in range(2, 9) if states[step] == states[step - 1]} == set(BAD)
    if engine == "ddp":
        first, second = (log.read_text(encoding="utf-8").split() for log in logs)
        assert first == second and len(first) == 8 and len(set(first)) == 8 - len(BAD)


@pytest.mark.fault(row=20)
def test_both_processes_stop_at_too_many_bad_steps(tmp_path: Path) -> None:
    bad = partial(poison, "loss", (3, 4), math.nan, 1)
    changes = {**SETTINGS, "training__max_skipped_steps": 1}
    with started(tiny_file(tmp_path, **changes), tmp_path, [None, bad]) as ranks:
        assert [rank.wait() for rank in ranks] == [2, 2], [rank.output for rank in ranks]
        assert "step 4" in ranks[0].output and "step-00000002" in ranks[0].output
    assert checkpoints(tmp_path) == ["step-00000002"]


@pytest.mark.fault(row=11)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, whole: Path, before: int, after: int, fault_figure: Callable[..., None]
) -> None:
    """All are killed in step 5; from step 4 on the losses are those of two processes."""
    changes = {**SETTINGS, "system__engine": "auto"}
    with started(
        tiny_file(tmp_path, **changes), tmp_path, [partial(die_in_step, LOST * 2 // before)] * before
    ) as ranks:
        assert {rank.wait() for rank in ranks} == {-signal.SIGKILL}
    if after == 1:
        code, output = call(["train", tiny_file(tmp_path, **changes)], tmp_path / "out.txt")
        assert code == 0, output
    else:
        with started(tiny_file(tmp_path, **changes), tmp_path, [None] * after) as ranks:
            assert [rank.wait() for rank in ranks] == [0] * after, [rank.output for rank in ranks]
    found, expected = (
        {line["step"]: line["loss"] for line in lines(run) if "loss" in line} for run in (tmp_path / "run", whole)
    )
    assert found == pytest.approx(expected, rel=1e-4), json.dumps(found)
    difference = max(abs(found[step] - expected[step]) for step in expected)
    fault_figure("largest difference of a loss", difference, largest=True)
