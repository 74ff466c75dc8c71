"""Callbacks: small parts that see each step and own their state; console, JSON lines, TensorBoard, W&B."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fusiontree.errors import ConfigError
from fusiontree.train.jsonl import JsonLines
from fusiontree.train.ranks import is_lost

# The bar's speed is that of the last ten minutes: a step may take longer than rich's 30 seconds.
REMEMBERED_SECONDS = 600.0


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands, as callbacks see it."""

    step: int  # optimizer steps done
    steps: int  # of the whole run
    say: Callable[[str], None]  # one line to the person watching


class Callback:
    """Every method may be left out; state comes back on resume under `name`."""

    name = ""

    def wants_gates(self, step: int) -> bool:
        """Whether the forward passes of this step must hand out their gates."""
        return False

    def on_start(self, run: Snapshot) -> None:
        """Before the first step of this process."""

    def on_forward(self, step: int, batch: Mapping[str, Any], out: Any) -> None:
        """After each forward pass of a step."""

    def on_step(self, run: Snapshot) -> None:
        """After each optimizer step."""

    def on_metrics(self, run: Snapshot, metrics: Mapping[str, Any]) -> None:
        """A line of figures: training (has `loss`) or validation (has `validation_loss`)."""

    def on_finish(self, run: Snapshot) -> None:
        """After the last step, also when interrupted or failed."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors to keep in the checkpoint."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state to keep in the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class MetricsFile(Callback):
    """metrics.jsonl."""

    name = "metrics_file"

    def __init__(self, file: JsonLines) -> None:
        self.file = file

    def on_metrics(self, run: Snapshot, metrics: Mapping[str, Any]) -> None:
        """Append the line."""
        self.file.write(metrics)


class StateFile(Callback):
    """state.json, for `fusiontree runs`: running, finished, interrupted or failed (and why), at which step."""

    name = "state_file"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outside: BaseException | None = None  # an error that the caller was already handling

    def on_start(self, run: Snapshot) -> None:
        """Running; when the process is killed this stays, and the run's lock is free."""
        self.outside = sys.exc_info()[1]
        self._write({"state": "running"}, run)

    def on_finish(self, run: Snapshot) -> None:
        """How it ended."""
        error = ending_error(self.outside)
        try:
            if error is None:
                self._write({"state": "finished" if run.step >= run.steps else "interrupted"}, run)
            else:
                lost = isinstance(error, RuntimeError) and is_lost(error)
                why = "another process of the run was lost" if lost else str(error) or type(error).__name__
                self._write({"state": "failed", "error": why}, run)
        except OSError as problem:  # a full disk, which is the very error to be told: it must not be replaced by this
            run.say(f"warning: {self.path}: cannot be written: {problem.strerror}")

    def _write(self, content: Mapping[str, Any], run: Snapshot) -> None:
        fresh = self.path.with_name(self.path.name + ".tmp")
        fresh.write_text(json.dumps({**content, "step": run.step, "steps": run.steps}) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)


class Console(Callback):
    """A progress bar on a terminal, plain lines elsewhere."""

    name = "console"

    def __init__(self, mode: Literal["auto", "plain", "off"]) -> None:
        self.mode = mode
        # Wide enough that a line of figures stays one line in a log file.
        self.rich = RichConsole(width=None if sys.stdout.isatty() else 200, highlight=False)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.pace: tuple[int, float] | None = None  # step and time from which the time left is reckoned

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        if self.mode != "off":
            self.rich.print(line, markup=False, soft_wrap=True)

    def on_start(self, run: Snapshot) -> None:
        """Show the bar where there is a terminal."""
        self.pace = None
        if self.mode == "auto" and self.rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.rich, expand=True, speed_estimate_period=REMEMBERED_SECONDS)
            self.task = self.progress.add_task("training", total=run.steps, completed=run.step)
            self.progress.start()

    def on_step(self, run: Snapshot) -> None:
        """Move the bar; the time left is reckoned from the end of this process's first step, which warms up."""
        if self.pace is None:
            self.pace = (run.step, time.monotonic())
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=run.step)

    def on_metrics(self, run: Snapshot, metrics: Mapping[str, Any]) -> None:
        """Show the figures."""
        if "loss" in metrics and self.progress is not None and self.task is not None:
            self.progress.update(self.task, description=_figures(metrics))
        elif "loss" in metrics:
            self.say(f"step {run.step}/{run.steps}  {_figures(metrics)}{self._time_left(run)}")
        else:
            shown = (f"{key.replace('_', ' ')} {value:.4f}" for key, value in metrics.items() if key != "step")
            figures = "  ".join(shown)
            self.say(f"step {run.step}/{run.steps}  {figures}")

    def _time_left(self, run: Snapshot) -> str:
        """Steps to go at the mean speed so far, validation and saving included; nothing before a step was timed."""
        if self.pace is None or run.step == self.pace[0]:
            return ""
        step, since = self.pace
        return f"  eta {_clock((run.steps - run.step) * (time.monotonic() - since) / (run.step - step))}"

    def on_finish(self, run: Snapshot) -> None:
        """Take the bar down."""
        if self.progress is not None:
            self.progress.stop()


class TensorBoard(Callback):
    """Scalars in the run's tensorboard folder."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_start(self, run: Snapshot) -> None:
        """Open the writer; what an interrupted run wrote after its last checkpoint is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=run.step + 1)

    def on_metrics(self, run: Snapshot, metrics: Mapping[str, Any]) -> None:
        """One scalar per figure."""
        for key, value in metrics.items():
            if key != "step":
                self.writer.add_scalar(key, value, metrics["step"])

    def on_finish(self, run: Snapshot) -> None:
        """Write what is still in memory."""
        if self.writer is not None:
            self.writer.close()


class WandB(Callback):
    """Weights & Biases, its files in the run folder; the id is kept so that a resumed run goes on in its curves."""

    name = "wandb"

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self.project = project
        self.run_dir = run_dir
        self.settings = dict(settings)
        self.run_id: str | None = None
        self.run: Any = None
        self.outside: BaseException | None = None

    def on_start(self, run: Snapshot) -> None:
        """Open the run; ConfigError where there is no key or no server (WANDB_MODE=offline needs neither)."""
        import wandb

        self.outside = sys.exc_info()[1]
        try:
            self.run = wandb.init(
                project=self.project,
                name=self.run_dir.name,
                dir=str(self.run_dir),
                config=self.settings,
                id=self.run_id,
                resume="allow",
            )
        except wandb.errors.Error as error:
            way = "WANDB_MODE=offline keeps the curves in the run folder for `wandb sync`"
            raise ConfigError(f"logging.wandb: {error} {way}; logging.wandb=false does without") from error
        self.run_id = self.run.id

    def on_metrics(self, run: Snapshot, metrics: Mapping[str, Any]) -> None:
        """One point per figure."""
        self.run.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])

    def on_finish(self, run: Snapshot) -> None:
        """Close the run, as failed when an error ends it."""
        if self.run is not None:
            self.run.finish(exit_code=0 if ending_error(self.outside) is None else 1)

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the run's id."""
        self.run_id = state["run_id"]


def ending_error(outside: BaseException | None) -> BaseException | None:
    """In `on_finish`, which is told while an error is on its way: that error, unless the caller had it before."""
    error = sys.exc_info()[1]
    return None if error is outside else error


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an allocation failed; torch has no type of its own for that on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (10^9 bytes): allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _figures(metrics: Mapping[str, Any]) -> str:
    gate = f"  gate {metrics['gate_mean']:.3f}" if metrics.get("gate_mean") is not None else ""
    return (
        f"loss {metrics['loss']:.4f}{gate}  lr {metrics['lr']:.2e}  "
        f"{metrics['tokens_per_second']:,.0f} tok/s  {metrics['memory_gb']:.1f} GB"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
