"""Three training steps in a process of its own, and the memory that they took beyond the built model; prints JSON.

Run as `python -m tests.train.memory_child FOLDER CHANGES`, CHANGES being JSON for `tiny_config`. On a CPU the figure is
the kernel's own: the high-water mark of the resident set, reset when the model stands. The parent sets
MALLOC_MMAP_THRESHOLD_, so that every tensor of some size is a mapping of its own, and the resident set is what lives.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fusiontree.train import train
from fusiontree.train.callbacks import Callback, Snapshot
from tests.train.tiny import tiny_config

STEPS = 3


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, its highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def settled() -> int:
    """Bytes in use now, with nothing left over from before."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


class Watch(Callback):
    """Bytes before anything is built, when the model stands, and the most until the last step is done."""

    def __init__(self) -> None:
        self.before, self.built, self.peak = settled(), 0, 0

    def on_start(self, run: Snapshot) -> None:
        self.built = settled()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def on_step(self, run: Snapshot) -> None:
        if run.step == STEPS:
            self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def run(folder: Path, changes: dict[str, Any]) -> Watch:
    watch = Watch()
    train(tiny_config(folder, **changes, training__steps=STEPS), callbacks=[watch])
    return watch


if __name__ == "__main__":
    place = Path(sys.argv[1])
    run(place / "first", {})  # libraries that load at the first step are not the run's memory
    found = run(place, json.loads(sys.argv[2]))
    print(json.dumps({"before": found.before, "built": found.built, "peak": found.peak}))
