"""Training steps in processes of their own, and the memory that they take; prints a JSON line per run.

Run as `python -m tests.train.memory_child JOBS`, or under torchrun; JOBS is a JSON file of what `tiny_config` takes. On
a CPU the figure is the kernel's own: the high-water mark of the resident set, reset when the model stands. The parent
sets MALLOC_MMAP_THRESHOLD_, so that every tensor of some size is a mapping of its own, and the resident set is what
lives. On a GPU it is torch's count of what it allocated.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fusiontree.train import train
from fusiontree.train.callbacks import Callback, Snapshot
from fusiontree.train.config import RunConfig
from tests.train.tiny import tiny_config, write_text

STEPS = 3


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, its highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Watch(Callback):
    """Bytes before anything is built, when the model stands, and the most until the last step is done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before, self.built, self.peak = self._settled(), 0, 0

    def _settled(self) -> int:
        gc.collect()
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        return resident("VmRSS")

    def on_start(self, run: Snapshot) -> None:
        self.built = self._settled()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def on_step(self, run: Snapshot) -> None:
        if run.step == STEPS:
            self.peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else resident("VmHWM")


def config_of(folder: Path, changes: dict[str, Any]) -> RunConfig:
    return tiny_config(folder, **changes, training__steps=STEPS)


def measured(folder: Path, jobs: list[dict[str, Any]], processes: int = 1) -> list[dict[str, int]]:
    """Do the jobs, in several processes by torchrun; bytes `before`, `built` and `peak` of each, in the first one."""
    for name in (f"job-{number}{part}" for number in range(len(jobs)) for part in ("", "-first")):
        (folder / name).mkdir()
        write_text(folder / name / "text.txt", documents=300)
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "tests.train.memory_child", str(file)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"before"')]


def main(file: Path) -> None:
    for number, job in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        # What libraries take when they are first used is not the run's memory: a tiny run under the same engine first.
        engine = {key: value for key, value in job.items() if key.startswith("system__")}
        for folder, changes in ((f"job-{number}-first", engine), (f"job-{number}", job)):
            config = config_of(file.parent / folder, changes)
            watch = Watch(config.system.device)
            train(config, callbacks=[watch])
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"before": watch.before, "built": watch.built, "peak": watch.peak}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
