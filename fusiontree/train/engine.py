"""The training loop: one step at a time, exact to resume, safe to interrupt."""

from __future__ import annotations

import errno
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fusiontree.data import Loader, build_loader, resolve_tokenizer, stage_at
from fusiontree.errors import CheckpointError, ConfigError, TrainingError
from fusiontree.models import compile_blocks
from fusiontree.train.build import (
    build_callbacks,
    build_model,
    choose_device,
    load_teacher,
    mixed_seed,
    prepare_model,
    run_folder,
    set_checkpointing,
)
from fusiontree.train.callbacks import Callback, Console, Snapshot, is_out_of_memory, memory_gb
from fusiontree.train.checkpoint import last_good
from fusiontree.train.config import RunConfig
from fusiontree.train.interrupt import StopSignals
from fusiontree.train.jsonl import JsonLines
from fusiontree.train.loss_scale import LossScale
from fusiontree.train.losses import HybridModelLoss, Share, phase_at, real_tokens, target_mask
from fusiontree.train.model_files import StateStream, load_optimizer, load_weights
from fusiontree.train.optim import learning_rate
from fusiontree.train.ranks import is_lost
from fusiontree.train.run_state import Progress, RunResult, RunStore, binding_settings
from fusiontree.train.spikes import SpikeGuard
from fusiontree.train.strategies import SingleProcess, build_strategy
from fusiontree.train.validation import Batch, Evaluate, Probe, Probes, Validation, model_inputs, to_device
from fusiontree.train.yaml_files import write_yaml

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk that is full, or no longer to be written


def train(
    config: RunConfig,
    *,
    model: Any | None = None,
    teacher: Any | None = None,
    evaluate: Evaluate | None = None,
    probes: Mapping[str, Probe] | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Run the training `config` describes, or go on with it when its run folder has a checkpoint.

    `model` is trained in place instead of one built from the model section. `teacher` (same vocabulary) feeds the
    distillation term. `evaluate(model, batches)` replaces the validation loss; `probes` are measured every
    `probes.every` steps. SIGTERM and Ctrl-C finish the step, save and return with `interrupted`. Raises ConfigError and
    DataError before the first step, CheckpointError when a checkpoint cannot be used or written, TrainingError when the
    loss is not finite or a spike too high.
    """
    run_dir = Path(config.system.run_dir)
    strategy = build_strategy(config, choose_device(config.system.device))
    try:
        with run_folder(run_dir, strategy.ranks):
            trainer = Trainer(config, run_dir, strategy, model, teacher, callbacks)
            trainer.hold_out(evaluate, probes)
            return trainer.run()
    except RuntimeError as error:
        if strategy.ranks.world_size == 1 or not is_lost(error):
            raise
        advice = f"last good checkpoint: {last_good(run_dir)}; start all again to go on from it"
        raise strategy.ranks.lost(error, advice) from error
    except OSError as error:
        if error.errno in _DISK:
            raise CheckpointError(f"{error.filename or run_dir}: cannot be written: {error.strerror}") from error
        raise


class Trainer:
    """The parts of one run and the loop over them."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        strategy: SingleProcess,
        model: Any | None,
        teacher: Any | None,
        callbacks: Sequence[Callback],
    ) -> None:
        settings, ranks = config.training, strategy.ranks
        if config.system.threads is not None:
            torch.set_num_threads(config.system.threads)
        self.config, self.settings, self.run_dir = config, settings, run_dir
        self.strategy, self.ranks = strategy, ranks
        self.console = Console(config.logging.console if ranks.first else "off")
        self.tokenizer = resolve_tokenizer(config.data.tokenizer, config.data.train, run_dir / "tokenizer")
        self.stages = settings.stages(ranks.world_size)
        self.stage = stage_at(self.stages, 0)
        self.loader = self._loader("train")
        if teacher is None and settings.teacher is not None:
            teacher = load_teacher(settings.teacher, self.tokenizer)
        if (teacher is not None) != (settings.loss.distill_weight > 0):
            raise ConfigError("training.loss.distill_weight: must be above 0 exactly when there is a teacher")
        self.loss = HybridModelLoss(settings.loss, distill=teacher is not None)
        self.model = model if model is not None else build_model(config, self.tokenizer)
        prepare_model(self.model, config, self.tokenizer)
        self.spikes = SpikeGuard(settings, JsonLines(run_dir / "spikes.jsonl", writes=ranks.first))
        own = build_callbacks(config, run_dir, self.tokenizer, self.console, ranks.first)
        self.callbacks: list[Callback] = [*callbacks, self.spikes, *own]
        binding = binding_settings(config, self.model.config, self.tokenizer)
        self.store = RunStore(run_dir, settings.save_total_limit, binding, ranks)
        self.resumed = self.store.find(self.console.say)
        load_weights(self.model, self.resumed, ranks)
        set_checkpointing(self.model, self._checkpointing())
        self.model.train()
        if settings.compile:
            compile_blocks(self.model)
        strategy.adopt(self.model, settings)
        self.teacher = None if teacher is None else strategy.host(teacher)
        self.validation: Validation | None = None
        self.progress = Progress()
        self.scale = LossScale(settings)
        self.clock = (time.monotonic(), 0)  # when and at how many tokens the next line's speed begins
        quiet = config.logging.console == "off" or not ranks.first
        self.stop = StopSignals("" if quiet else "stopping: the step is finished and saved first")

    def hold_out(self, evaluate: Evaluate | None, probes: Mapping[str, Probe] | None) -> None:
        """Take the validation batches, none when the settings hold nothing out, and the probes."""
        self.probes = Probes(self.config.probes.every, probes)
        if self.config.data.validation or self.config.data.validation_fraction > 0:
            batches = cast(Iterator[Batch], iter(self._loader("validation")))
            self.validation = Validation(batches, self.settings.validation_batches, evaluate, self.ranks)

    def run(self) -> RunResult:
        """Resume if there is something to resume, then step until done or asked to stop."""
        self._resume_or_start()
        with self.stop:
            try:
                self._go()
            finally:
                self._tell("on_finish", self._snapshot())
        return self._finish()

    def _go(self) -> None:
        """Every step that is left, with validation and saving where they are due."""
        steps, progress = self.settings.steps, self.progress
        self._tell("on_start", self._snapshot())
        if self.resumed is None:
            self._validate()
            self._probe()
        batches = cast(Iterator[Batch], iter(self.loader))
        while progress.step < steps and not self._asked_to_stop():
            self._enter_stage()
            self._step([next(batches) for _ in range(self.stage.accumulation_steps)])
            last = progress.step == steps
            if last or _due(progress.step, self.settings.validation_every):
                self._validate()
            self._probe()
            if last or _due(progress.step, self.settings.save_every):
                self._save()
        if self.store.newest_step != progress.step:
            self._save()

    def _asked_to_stop(self) -> bool:
        """Whether any process got a signal; all stop after the same step."""
        return bool(self.ranks.sum(torch.tensor(int(self.stop.requested))))

    def _enter_stage(self) -> None:
        """Change to the row length that the curriculum has for the next step, with as many tokens per step."""
        stage = stage_at(self.stages, self.progress.step)
        if stage == self.stage:
            return
        self.stage = stage
        self.loader.resize(stage.length, stage.micro_batch_size)
        set_checkpointing(self.model, self._checkpointing())
        cut = f"{stage.accumulation_steps} × {stage.micro_batch_size} rows of {stage.length} tokens"
        self.console.say(f"step {self.progress.step + 1}: {cut} from here")

    def _checkpointing(self) -> str:
        """The run's own choice; everything where a single row is more than a micro-batch was meant to hold."""
        return "block" if self.stage.needs_memory else self.settings.activation_checkpointing

    def _step(self, batches: list[Batch]) -> None:
        """One optimizer step over some micro-batches; every real token weighs the same, whichever batch it is in."""
        started, progress, step = time.monotonic(), self.progress, self.progress.step + 1
        shares, targets = self._shares(batches)
        lr = learning_rate(progress.step, self.settings)
        self.strategy.optimizers.set_lr(lr)
        try:
            parts = [self._micro_step(step, i, batch, shares) for i, batch in enumerate(batches)]
            sums = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in parts[0]])
            # Read here, where the update waits for the device anyway; after it the next step can begin meanwhile.
            terms = dict(zip(parts[0], self.ranks.sum(sums).tolist(), strict=True))
            norm, updated = self.strategy.update(self.settings.max_grad_norm, self.scale.value)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._failed(f"step {step}: out of memory", "a smaller training.micro_batch_size") from error
        if updated:
            self.scale.succeeded()
            progress.skipped_in_a_row = 0
        elif not (math.isfinite(terms["loss"]) and self.scale.shrink()):
            self._skip(step, terms, norm)
        progress.step, progress.tokens = step, progress.tokens + targets
        progress.elapsed += time.monotonic() - started
        self._look_for_a_spike(terms["loss"], norm)
        self._report({**terms, "grad_norm": norm}, lr)

    def _shares(self, batches: list[Batch]) -> tuple[list[Share], int]:
        """What part of the step each micro-batch is, and the step's targets, over all processes."""
        counts = [(int(target_mask(batch).sum()), real_tokens(batch)) for batch in batches]
        targets, tokens = self.ranks.sum(torch.tensor(counts).sum(0)).tolist()
        return [Share(own / max(targets, 1), real / max(tokens, 1)) for own, real in counts], targets

    def _micro_step(self, step: int, index: int, batch: Batch, shares: list[Share]) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; gives its shares of the step's loss terms."""
        phase = phase_at(step - 1, self.settings.steps, self.settings.loss)
        watchers = [callback for callback in self.callbacks if callback.wants_gates(step)]
        gates = bool(watchers) or self._logs(step) or self.loss.needs_gates(phase)
        batch = to_device(batch, self.strategy.device)
        # The same branches in every micro-batch and process, so that the step does not depend on how it is divided.
        self.model.branch_dropout_seed = mixed_seed(self.config.system.seed, step)
        with self.strategy.accumulating(last=index == len(shares) - 1):
            with self._autocast():
                out = self.strategy.forward(**model_inputs(batch), output_gates=gates, skip_logits=self.teacher is None)
                terms = self.loss(out, batch, phase, self._teacher_logits(batch), shares[index])
            # Times 1, or, where the loss is not finite, NaN: then the gradients' norm tells in every process.
            self.strategy.backward(terms["loss"] * (terms["loss"].detach() * 0 + 1), self.scale.value)
        for callback in watchers:
            callback.on_forward(step, batch, out)
        return {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor | None:
        if self.teacher is None:
            return None
        inputs = {key: value for key, value in model_inputs(batch).items() if key != "labels"}
        logits: Tensor = self.teacher(**inputs).logits
        return logits

    def _look_for_a_spike(self, loss: float, norm: float) -> None:
        """Tell a loss that stands out, with the text of the step; stop where the settings say so."""
        spike = self.spikes.see(self.progress.step, loss, norm)
        if spike is not None:
            rows, end = self.stage.accumulation_steps * self.stage.micro_batch_size, self.loader.position
            samples = range(end - rows * self.ranks.world_size, end)
            line = self.spikes.tell(spike, samples, self.loader.origins)
            if self.spikes.ends_the_run(spike):
                raise self._failed(line, "a lower training.lr or a higher training.spike_stop")
            self.console.say(f"warning: {line}")

    def _skip(self, step: int, terms: Mapping[str, float], norm: float) -> None:
        """Say that a bad step was left out of the weights; stop when there are too many in a row."""
        self.progress.skipped_in_a_row += 1
        figures = ", ".join(f"{name} {value:.4g}" for name, value in {**terms, "grad_norm": norm}.items())
        what = f"step {step}: loss or gradient is not finite ({figures}); the weights were not updated"
        if self.progress.skipped_in_a_row > self.settings.max_skipped_steps:
            raise self._failed(what, "a lower training.lr")
        self.console.say(f"warning: {what}; going on")

    def _failed(self, what: str, change: str) -> TrainingError:
        """The error that ends the run, with how to go on."""
        return TrainingError(f"{what}; last good checkpoint: {last_good(self.run_dir)}; try {change}")

    def _report(self, figures: Mapping[str, float], lr: float) -> None:
        """Tell the callbacks of a finished step, with its figures when it is time for a line."""
        progress = self.progress
        if self._logs(progress.step):
            progress.final_loss = figures["loss"]
            now = time.monotonic()
            seconds, tokens = now - self.clock[0], progress.tokens - self.clock[1]
            self.clock = (now, progress.tokens)
            line = {
                "step": progress.step,
                **figures,
                "lr": lr,
                "spikes": self.spikes.count,
                "tokens": progress.tokens,
                "tokens_per_second": tokens / max(seconds, 1e-9),
                "memory_gb": memory_gb(self.strategy.device),
                "elapsed": progress.elapsed,
            }
            self._tell("on_metrics", self._snapshot(), line)
        self._tell("on_step", self._snapshot())

    def _logs(self, step: int) -> bool:
        return step % self.config.logging.every == 0 or step in (1, self.settings.steps)

    def _validate(self) -> None:
        """Measure the held-out text and remember the best."""
        if self.validation is None:
            return
        progress = self.progress
        with self._autocast():
            figures = self.validation.measure(self.model)
        loss = figures["validation_loss"]
        progress.validation_loss_after = loss
        if progress.validation_loss_before is None:
            progress.validation_loss_before = loss
        if progress.best_validation_loss is None or loss < progress.best_validation_loss:
            progress.best_validation_loss, progress.best_step = loss, progress.step
        self._tell("on_metrics", self._snapshot(), {"step": progress.step, **figures})
        self.clock = (time.monotonic(), progress.tokens)

    def _probe(self) -> None:
        """Measure the probes when it is time."""
        if self.probes.due(self.progress.step, self.settings.steps):
            with self._autocast():
                figures = self.probes.measure(self.model, self.strategy.device)
            self._tell("on_metrics", self._snapshot(), {"step": self.progress.step, **figures})
            self.clock = (time.monotonic(), self.progress.tokens)

    def _save(self) -> None:
        """Write a checkpoint of this moment."""
        stream = StateStream(self.strategy)

        def fill(folder: Path) -> None:
            stream.write(folder)
            shutil.copytree(self.run_dir / "tokenizer", folder, dirs_exist_ok=True)

        self.progress.loss_scale = self.scale.state_dict()
        self.store.save(self.progress, fill, stream.drain, self.loader.state_dict(), self.callbacks)
        self.clock = (time.monotonic(), self.progress.tokens)

    def _resume_or_start(self) -> None:
        """Take up the newest good checkpoint of the run folder, or begin at step 0."""
        folder = self.resumed
        if folder is not None:
            load_optimizer(self.strategy, folder)
            self.progress, loader_state = self.store.restore(folder, self.callbacks)
            self.scale.load_state_dict(self.progress.loss_scale)
            self._enter_stage()
            self.loader.load_state_dict(loader_state)
            done = self.progress.step >= self.settings.steps
            how = "finished already; a larger training.steps goes on from" if done else "going on from"
            self.console.say(f"{how} step {self.progress.step} of {self.settings.steps} ({folder})")
        self._introduce()
        if self.ranks.first:
            self.store.trim_logs(self.progress.step if folder is not None else -1)
            text = write_yaml(self.config.model_dump(mode="json"))
            (self.run_dir / "config.yaml").write_text(text, encoding="utf-8")
        self.clock = (time.monotonic(), self.progress.tokens)

    def _introduce(self) -> None:
        """Say what is trained on what, and which records were left out."""
        bad, say = self.loader.bad_records, self.console.say
        many = f", {self.ranks.world_size} processes" if self.ranks.world_size > 1 else ""
        say(f"model: {self.strategy.parameters / 1e6:.2f} M parameters on {self.strategy.device}{many}")
        tokens = self.loader.tokens_per_epoch
        say(f"data: {bad.summary()}, {f'{tokens / 1e6:.2f} M tokens per epoch' if tokens else 'read as a stream'}")
        for example in bad.examples[:5]:
            say(f"warning: skipped {example}")

    def _finish(self) -> RunResult:
        """Say how it ended and write summary.json."""
        progress, steps = self.progress, self.settings.steps
        if progress.step < steps:
            where = f"step {progress.step} of {steps}"
            self.console.say(f"stopped and saved at {where}; run the same command again to go on")
        counts = {"parameters": self.strategy.parameters, "spikes": self.spikes.count}
        return self.store.finish(progress, steps, **counts, bad_records=self.loader.bad_records.to_json())

    def _loader(self, split: Literal["train", "validation"]) -> Loader:
        settings, stage = self.settings, self.stage
        learns = split == "train"
        return build_loader(
            self.config.data,
            self.tokenizer,
            split=split,
            sequence_length=stage.length if learns else settings.sequence_length,
            batch_size=stage.micro_batch_size if learns else settings.micro_batch_size,
            seed=self.config.system.seed,
            rank=self.ranks.rank if learns else 0,  # validation is divided by whole batches
            world_size=self.ranks.world_size if learns else 1,
            longest=max(stage.length for stage in self.stages) if learns else None,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
        return torch.autocast(self.strategy.device.type, dtype, enabled=dtype is not None)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.progress.step, self.settings.steps, self.console.say)

    def _tell(self, event: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*details)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
