"""What a run needs to go on exactly: counters, random states, data position, callbacks, and the settings it has."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusiontree.data import SourceConfig, TokenizerConfig, tokenizer_hash
from fusiontree.errors import CheckpointError
from fusiontree.models import HybridConfig
from fusiontree.train.callbacks import Callback
from fusiontree.train.checkpoint import keep_newest, latest_checkpoint, list_checkpoints, sweep, write_checkpoint
from fusiontree.train.config import MODEL_ARGUMENTS, DataSection, RunConfig, TrainingSection
from fusiontree.train.jsonl import JsonLines
from fusiontree.train.ranks import Ranks
from fusiontree.train.tensors import read_tensors

STATE_JSON, STATE_TENSORS = "trainer/state.json", "trainer/state.safetensors"

# Settings that may change when a run goes on: they move neither the weights done so far nor the data position.
FREE = (
    "training.steps",  # to train longer; the schedule follows the new value
    "training.save_every",
    "training.save_total_limit",
    "training.validation_every",
    "training.validation_batches",
    "training.max_skipped_steps",
    "training.spike_factor",
    "training.spike_stop",
    "training.compile",
    "training.activation_checkpointing",
    "data.num_workers",
    "data.cache_dir",
    "data.tokenizer.",  # the tokenizer itself is compared
    "gate_monitor.",
    "probes.",
    "logging.",
    "system.run_dir",
    "system.device",
    "system.threads",
    "system.engine",
    "system.deepspeed",
    "system.offload",
    "system.timeout",
    "training.micro_batch_size",  # their product binds
    "training.accumulation_steps",
)


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # targets learned from
    elapsed: float = 0.0  # seconds of training, over all processes of the run
    skipped_in_a_row: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)  # of fp16
    final_loss: float | None = None  # of the last step
    validation_loss_before: float | None = None
    validation_loss_after: float | None = None  # the newest
    best_step: int | None = None
    best_validation_loss: float | None = None


@dataclass(frozen=True)
class RunResult:
    """What `train` gives back; losses are in nats per token."""

    run_dir: Path
    step: int
    final_loss: float | None
    validation_loss_before: float | None
    validation_loss_after: float | None
    best: dict[str, Any] | None  # {"step", "validation_loss"}
    interrupted: bool = False  # a signal stopped the run; the same call goes on


def binding_settings(config: RunConfig, model_config: Any, tokenizer: Any) -> dict[str, Any]:
    """Flat `section.key` -> value of all that must stay when a run goes on; the loader checks the data itself."""
    content = config.model_dump(mode="json", exclude={"model"})
    own = MODEL_ARGUMENTS.keys() - {"use_cache"}  # which does not make another model
    settings = _flatten({**content, "model": {name: getattr(model_config, name) for name in sorted(own)}})
    settings["tokenizer"] = tokenizer_hash(tokenizer)
    settings["training.rows_per_step"] = config.training.micro_batch_size * config.training.accumulation_steps
    plain = json.loads(json.dumps(settings))  # tuples become lists, as in the file it is compared with
    return {key: value for key, value in plain.items() if not key.startswith(FREE)}


class RunStore:
    """The checkpoints of one run folder: find a good one, check that it belongs, take it up, write the next.

    Of several processes the first reads and writes, all take up what it read.
    """

    def __init__(self, run_dir: Path, limit: int | None, settings: Mapping[str, Any], ranks: Ranks) -> None:
        self.run_dir, self.root, self.limit = run_dir, run_dir / "checkpoints", limit
        self.settings, self.ranks = settings, ranks
        self.newest_step: int | None = None

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """The checkpoint to go on from, or None in a fresh folder; clears away what a killed save left.

        Raises CheckpointError when there are checkpoints but none is whole, or when the newest is of other settings.
        """
        return self.ranks.on_first(lambda: self._find(warn))

    def _find(self, warn: Callable[[str], None]) -> Path | None:
        sweep(self.root)
        folder = latest_checkpoint(self.run_dir, warn)
        if folder is None and list_checkpoints(self.root):
            raise CheckpointError(f"{self.root}: no checkpoint is whole; delete them to start again from step 0")
        if folder is not None:
            check_settings(folder, read_run_state(folder)["settings"], self.settings)
        return folder

    def restore(self, folder: Path, callbacks: Iterable[Callback]) -> tuple[Progress, dict[str, Any]]:
        """Give callbacks and random generators their state back; gives the counters and the loader's state.

        Raises CheckpointError when the state is not one that `save` wrote.
        """
        content, tensors = self.ranks.on_first(lambda: (read_run_state(folder), read_tensors(folder / STATE_TENSORS)))
        try:
            return self._take_up(content, tensors, callbacks), content["loader"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: the training state cannot be used: {error}") from error

    def _take_up(
        self, content: Mapping[str, Any], tensors: Mapping[str, Tensor], callbacks: Iterable[Callback]
    ) -> Progress:
        for callback in callbacks:
            own = _below(tensors, f"callback/{callback.name}/")
            if own:
                callback.load_state_tensors(own)
            if content["callbacks"].get(callback.name):
                callback.load_state_dict(content["callbacks"][callback.name])
        version, internal, gauss = content["python_rng"]
        random.setstate((version, tuple(internal), gauss))
        _set_rng(_below(tensors, "rng/"))
        progress = Progress(**content["progress"])
        self.newest_step = progress.step
        return progress

    def save(
        self,
        progress: Progress,
        fill: Callable[[Path], None],
        drain: Callable[[], None],
        loader_state: Mapping[str, Any],
        callbacks: Iterable[Callback],
    ) -> None:
        """Write the checkpoint of this moment, then delete what is beyond the limit; raises CheckpointError.

        `fill` puts model and optimizer into the folder; `drain` is called in every process, whether or not that worked.
        """
        drained = ExitStack()
        drained.callback(drain)
        if not self.ranks.first:
            drained.close()

        def work() -> None:
            with drained:
                self._save(progress, fill, loader_state, callbacks)

        self.ranks.on_first(work)
        self.newest_step = progress.step

    def _save(
        self,
        progress: Progress,
        fill: Callable[[Path], None],
        loader_state: Mapping[str, Any],
        callbacks: Iterable[Callback],
    ) -> None:

        def write(folder: Path) -> None:
            (folder / "trainer").mkdir()
            fill(folder)
            _write_run_state(folder, progress, self.settings, loader_state, list(callbacks))

        facts = {"config_hash": settings_hash(self.settings), "world_size": self.ranks.world_size}
        write_checkpoint(self.root, progress.step, write, facts)
        keep_newest(self.root, self.limit, also=progress.best_step)

    def finish(self, progress: Progress, steps: int, **facts: Any) -> RunResult:
        """What the run came to, written to summary.json with some `facts`."""
        best = None
        if progress.best_step is not None:
            best = {"step": progress.best_step, "validation_loss": progress.best_validation_loss}
        result = RunResult(
            run_dir=self.run_dir,
            step=progress.step,
            final_loss=progress.final_loss,
            validation_loss_before=progress.validation_loss_before,
            validation_loss_after=progress.validation_loss_after,
            best=best,
            interrupted=progress.step < steps,
        )
        counted = {"tokens": progress.tokens, "elapsed": progress.elapsed, **facts}
        summary = {**asdict(result), "run_dir": self.run_dir.name, **counted}
        if self.ranks.first:
            (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return result

    def trim_logs(self, step: int) -> None:
        """Drop the lines after `step`: the resumed run writes them again."""
        for name in ("metrics.jsonl", "gates.jsonl"):
            JsonLines(self.run_dir / name).trim(step)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings, for the manifest."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write_run_state(
    folder: Path,
    progress: Progress,
    settings: Mapping[str, Any],
    loader_state: Mapping[str, Any],
    callbacks: list[Callback],
) -> None:
    tensors = {f"rng/{name}": state for name, state in _rng_tensors().items()}
    for callback in callbacks:
        tensors.update({f"callback/{callback.name}/{key}": t.cpu() for key, t in callback.state_tensors().items()})
    content = {
        "progress": asdict(progress),
        "settings": settings,
        "loader": loader_state,
        "python_rng": random.getstate(),
        "callbacks": {callback.name: callback.state_dict() for callback in callbacks},
    }
    (folder / STATE_JSON).write_text(json.dumps(content), encoding="utf-8")
    save_file(tensors, folder / STATE_TENSORS)


def read_run_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's trainer folder; raises CheckpointError when it cannot be read."""
    path = folder / STATE_JSON
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return content


def check_settings(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing the fields in which the run's settings differ from the checkpoint's.

    A setting that one of them does not know has its default there: it did not exist yet, or no longer does.
    """
    defaults = _defaults()
    differing = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = (side.get(key, defaults.get(key, "absent")) for side in (saved, wanted))
        if before != now:
            differing.append(f"{key} ({before} -> {now})")
    if differing:
        fields = ", ".join(differing)
        raise CheckpointError(
            f"{folder}: made with other settings: {fields}; set them back, or start in a new system.run_dir"
        )


def _defaults() -> dict[str, Any]:
    """Flat `section.key` -> value of a run that says no more than it must."""
    training = TrainingSection(steps=1, sequence_length=2, micro_batch_size=1)
    data = DataSection(train=[SourceConfig(path="stdlib")], tokenizer=TokenizerConfig(path="byte"))
    content = RunConfig(training=training, data=data).model_dump(mode="json", exclude={"model"})
    model, own = HybridConfig(), MODEL_ARGUMENTS.keys()
    plain = json.loads(json.dumps({**content, "model": {name: getattr(model, name) for name in own}}))
    return _flatten(plain)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rng_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def _set_rng(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{index}" in states:  # absent when the checkpoint was made on a machine with fewer GPUs
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
