"""Runs a grid: the sweep, every architecture with every seed, what is measured of each; killed, it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.data import resolve_tokenizer, tokenizer_hash
from fusiontree.deploy.progress import ProgressFn, silent
from fusiontree.errors import CheckpointError, TrainingError
from fusiontree.eval.provenance import provenance
from fusiontree.lab.grid.config import GridConfig
from fusiontree.lab.grid.folder import RUNS, Results, alone
from fusiontree.lab.grid.matching import Contender, contenders
from fusiontree.lab.grid.measure import measure_model
from fusiontree.lab.grid.progress import GridProgress, Ticker
from fusiontree.lab.grid.turns import measure_turns
from fusiontree.models.loading import load_model
from fusiontree.train import RunConfig, latest_checkpoint, train
from fusiontree.train.build import choose_device
from fusiontree.train.config import parse_config

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One training run of a grid."""

    contender: Contender
    seed: int
    steps: int
    lr: float | None  # None: the one that the sweep finds
    kind: str  # "sweep" or "runs"

    @property
    def key(self) -> str:
        """Name in the results and of the folder."""
        return f"{self.contender.name}/{f'lr-{self.lr:g}' if self.kind == 'sweep' else f'seed-{self.seed}'}"


def run_grid(
    grid: GridConfig, kind: str, out: Path, *, command: str = "", progress: ProgressFn = silent, say: Say = print
) -> Path:
    """Do what is not done yet of a grid in the folder `out`; the path of its results.json.

    Raises ConfigError for a grid that cannot be or a folder of another one, DataError for unusable text, TrainingError
    when every rate of a sweep diverges; KeyboardInterrupt, with how to go on, when a run is stopped.
    """
    vocabulary = grid.data.tokenizer.train_vocab_size
    if vocabulary is not None:  # what cannot be is said before a tokenizer is trained
        contenders(grid, vocabulary)
    with alone(out):
        runner = Runner(grid, kind, out, GridProgress(progress), say)
        start = {**provenance(runner.device), "command": command}
        runner.results.enter(runner.contenders, tokenizer_hash(runner.tokenizer), start)
        runner.run()
    return runner.results.path


class Runner:
    """A grid at work in its folder."""

    def __init__(self, grid: GridConfig, kind: str, out: Path, progress: GridProgress, say: Say) -> None:
        self.grid, self.out, self.progress, self.say = grid, out, progress, say
        self.device = choose_device(grid.system.device)
        self.results = Results(out, kind, grid)
        self.tokenizer = resolve_tokenizer(grid.data.tokenizer, grid.data.train, out / "tokenizer")
        self.contenders = contenders(grid, max(self.tokenizer.get_vocab().values()) + 1)

    def run(self) -> None:
        """The sweep first, then seed by seed, so that a part of a grid is a comparison already."""
        grid, all_of = self.grid, list(self.contenders.values())
        sweep = [
            Job(contender, grid.seeds[0], self._sweep_steps(contender), lr, "sweep")
            for contender in (all_of if grid.sweep is not None else [])
            for lr in (grid.sweep.lrs if grid.sweep is not None else [])
        ]
        lr = None if grid.sweep is not None else grid.training.lr
        runs = [Job(contender, seed, contender.steps, lr, "runs") for seed in grid.seeds for contender in all_of]
        todo = [job for job in (*sweep, *runs) if not self._done(job)]
        for job in todo:
            self.progress.expect(job.steps, job.contender.cost(job.steps))
        for job in todo:
            self._sweep(job) if job.kind == "sweep" else self._train(job)
        self._measure_turns()

    def _done(self, job: Job) -> bool:
        return job.key in self.results.content[job.kind]

    def _sweep_steps(self, contender: Contender) -> int:
        wanted = self.grid.sweep.steps if self.grid.sweep is not None else None
        return min(contender.steps, wanted or max(1, contender.steps // 4))

    def _sweep(self, job: Job) -> None:
        """One short run; all that is kept is what it came to."""
        run = self._config(job)
        outcome: dict[str, Any] = {"architecture": job.contender.name, "lr": job.lr, "steps": job.steps}
        try:
            outcome["loss"] = self._fit(job, run)
        except TrainingError as error:
            outcome["why"] = " ".join(str(error).split())
        shutil.rmtree(Path(run.system.run_dir) / "checkpoints", ignore_errors=True)
        self._keep(job, outcome)

    def _train(self, job: Job) -> None:
        """One long run and what is measured of it; one that fails is left out and tried again at the next start."""
        run = self._config(job)
        failed = self.results.content["failed"]
        try:
            self._fit(job, run)
        except TrainingError as error:
            failed[job.key] = " ".join(str(error).split())
            self.results.write()
            self.say(f"warning: {job.key}: {error}")
            return
        failed.pop(job.key, None)
        self.progress.say(f"{job.key}: measuring")
        figures = measure_model(self._model(job), self.tokenizer, run, self.grid.measure)
        facts = {"architecture": job.contender.name, "seed": job.seed, "lr": run.training.lr}
        self._keep(job, {**facts, **figures})
        validation = figures["validation"]
        self.say(f"{job.key}: validation loss {validation['loss']:.4f}")

    def _keep(self, job: Job, outcome: Mapping[str, Any]) -> None:
        self.results.content[job.kind][job.key] = dict(outcome)
        if job.kind == "runs":
            self.results.content["turns"] = {}  # of fewer models than there are now
        self.results.write()

    def _fit(self, job: Job, run: RunConfig) -> float:
        """Train, or go on; the validation loss at the end."""
        ticker = Ticker(self.progress, job.key, job.contender.cost(1))
        try:
            result = train(run, callbacks=[ticker])
        except TrainingError:
            left = job.steps - ticker.done
            self.progress.passed(left, job.contender.cost(left))
            raise
        if result.interrupted:
            raise KeyboardInterrupt(
                f"interrupted in {job.key} at step {result.step}; the same command goes on from there, what is "
                "finished is kept"
            )
        assert result.validation_loss_after is not None
        return result.validation_loss_after

    def _config(self, job: Job) -> RunConfig:
        training = self.grid.training
        changes = {
            "steps": job.steps,
            "lr": self._lr(job),
            "warmup_steps": min(training.warmup_steps, round(training.warmup_steps * job.steps / job.contender.steps)),
            "save_total_limit": 1,
        }
        content = {
            "model": job.contender.model,
            "training": {**training.model_dump(mode="json"), **changes},
            "data": {**self.grid.data.model_dump(mode="json"), "tokenizer": {"path": str(self.out / "tokenizer")}},
            "logging": {"every": 1, "console": "off", "tensorboard": False},
            "system": {
                **self.grid.system.model_dump(mode="json"),
                "run_dir": str(self.out / RUNS / job.key),
                "seed": job.seed,
            },
        }
        return parse_config(content, where=job.key)

    def _lr(self, job: Job) -> float:
        if job.lr is not None:
            return job.lr
        return best_rate(self.results.content["sweep"], job.contender.name)

    def _model(self, job: Job) -> Any:
        run_dir = self.out / RUNS / job.key
        found = latest_checkpoint(run_dir)
        if found is None:
            raise CheckpointError(f"{run_dir}: no checkpoint verifies; remove {run_dir} and start again")
        return load_model(found).to(self.device)

    def _measure_turns(self) -> None:
        """Speed and memory of the first seed's models; a part of them when runs failed."""
        first = [
            Job(contender, self.grid.seeds[0], contender.steps, None, "runs") for contender in self.contenders.values()
        ]
        names = [job.contender.name for job in first if self._done(job)]
        if not names or list(self.results.content["turns"]) == names:
            return
        models = {job.contender.name: self._model(job) for job in first if self._done(job)}
        found = measure_turns(models, self.grid.training, self.grid.measure, self.progress.say)
        self.results.content["turns"] = found
        self.results.write()


def best_rate(sweep: Mapping[str, Any], name: str) -> float:
    """The learning rate with the lowest loss; TrainingError when all diverged."""
    own = [entry for entry in sweep.values() if entry["architecture"] == name]
    finite = [entry for entry in own if entry.get("loss") is not None]
    if not finite:
        rates = ", ".join(f"{entry['lr']:g}" for entry in own)
        raise TrainingError(f"{name}: no learning rate of the sweep ({rates}) came to a loss; add lower ones")
    best: float = min(finite, key=lambda entry: entry["loss"])["lr"]
    return best
