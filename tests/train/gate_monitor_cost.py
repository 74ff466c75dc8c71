"""What watching the gates costs, as a share of a training step: `python -m tests.train.gate_monitor_cost [STEPS]`.

Not a test: figures of a busy machine prove nothing. Counted are the monitor's own calls and the branch norms that the
model computes for it, interleaved with everything else on the CPU, where every call is finished when it returns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fusiontree.models import hybrid_block
from fusiontree.train import GateMonitor, RunConfig, load_config, train

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


class Stopwatch:
    """Adds up the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def measure_cost(config: RunConfig) -> tuple[float, float]:
    """(seconds in the monitor, seconds of training) of a run."""
    watch = Stopwatch()
    for name in ("on_forward", "on_step"):
        watch.wrap(GateMonitor, name)
    watch.wrap(hybrid_block, "_rms")
    train(config)
    summary = json.loads((Path(config.system.run_dir) / "summary.json").read_text(encoding="utf-8"))
    return watch.seconds, summary["elapsed"]


def main() -> None:
    steps = sys.argv[1] if len(sys.argv) > 1 else "40"
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"training.steps={steps}", "training.warmup_steps=0", "training.validation_every=null"]
        overrides += ["training.save_every=null", "training.validation_batches=1", f"system.run_dir={folder}"]
        monitor, total = measure_cost(load_config(CONFIG, [*overrides, *sys.argv[2:]]))
    print(
        f"monitor {monitor:.3f} s of {total:.1f} s = {100 * monitor / total:.2f}% ({torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
