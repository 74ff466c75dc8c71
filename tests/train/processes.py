"""Real runs in several processes: started by torchrun, each doing a list of jobs one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fusiontree.recipes.probes import training_probes
from fusiontree.train import Callback, train
from fusiontree.train.config import parse_config

RANK = int(os.environ.get("RANK", "0"))


class SampleIds(Callback):
    """Writes which samples this process saw in each step."""

    name = "sample_ids"

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / f"samples-{RANK}.jsonl"

    def wants_gates(self, step: int) -> bool:
        return True

    def on_forward(self, step: int, batch: Any, out: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([step, batch["sample_ids"]]) + "\n")


def run_job(content: dict[str, Any]) -> None:
    """Train as a config's content says."""
    config = parse_config(content)
    train(config, callbacks=[SampleIds(Path(config.system.run_dir))], probes=training_probes(config))


def launch(processes: int, jobs: list[dict[str, Any]], folder: Path, timeout: float = 240) -> None:
    """Do the jobs in several processes; fails with what they printed."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "tests.train.processes", str(path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]


def once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that is filled once for all workers of pytest-xdist; the others wait for it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        fill(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            fill(folder)
            (folder / "filled").touch()
    assert (folder / "filled").exists(), f"another worker could not fill {folder}"
    return folder


def samples(run_dir: Path) -> dict[int, list[int]]:
    """Step → the samples of all processes, in order; a step that was done twice counts once, as it must be the same."""
    seen: dict[int, dict[int, list[int]]] = {}
    for path in sorted(run_dir.glob("samples-*.jsonl")):
        own: dict[int, list[int]] = {}
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            own.setdefault(step, []).extend(ids)
        for step, ids in own.items():
            seen.setdefault(step, {})[int(path.stem.split("-")[1])] = ids
    return {step: sorted(sample for ids in by_rank.values() for sample in ids) for step, by_rank in seen.items()}


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_job(job)
