"""Puts tasks to a model: answers are kept sample by sample, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from fusiontree.errors import ConfigError, DataError, FusionTreeError
from fusiontree.eval.groups import group_results
from fusiontree.eval.journal import Journal, finite, write_lines
from fusiontree.eval.provenance import provenance
from fusiontree.eval.results import FILE, Results, spread
from fusiontree.eval.subject import Subject
from fusiontree.eval.task import AnyTask, DirectTask, Sample, Scored, Task, TaskSettings

# Samples are sorted by length within so many batches: less padding, and never all prompts in memory.
WINDOW = 32

Show = Callable[[int, int, str], None]
"""Told (done, in all or 0 where that is not known, remark)."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome:
    """What came of the tasks: results by name, of families by theirs, and why the others have none."""

    results: dict[str, Any]
    groups: dict[str, Any]
    failed: dict[str, FusionTreeError]
    path: Path


@contextlib.contextmanager
def silent(_: str) -> Iterator[Show]:
    """Show nothing."""
    yield lambda done, total, remark: None


def evaluate(
    subject: Subject,
    tasks: Sequence[AnyTask],
    settings: TaskSettings,
    out: Path,
    *,
    command: str = "",
    progress: Callable[[str], contextlib.AbstractContextManager[Show]] = silent,
) -> Outcome:
    """Run the tasks one after the other and keep results.json, samples/TASK.jsonl and parts/TASK.jsonl in `out`.

    Started again with the same settings it asks only what has no answer yet. A task that cannot be done leaves the
    others alone and is named in `failed`. ConfigError when `out` belongs to another model, other settings or a running
    evaluation.
    """
    for length in settings.lengths:
        if length > subject.max_length:
            raise ConfigError(f"--lengths {length}: {subject.name} may see at most {subject.max_length} tokens")
    failed: dict[str, FusionTreeError] = {}
    with alone(out):
        results = Results(out, describe(subject))
        for task in tasks:
            try:
                with progress(task.name) as show:
                    results.add(task.name, _timed(task, subject, settings, results, show) | {"command": command})
            except FusionTreeError as error:
                failed[task.name] = error
        groups = group_results({task.name.partition(":")[0] for task in tasks}, results.tasks, settings_of(settings))
        results.add_groups(groups)
    done = {task.name: results.tasks[task.name] for task in tasks if task.name not in failed}
    return Outcome(done, groups, failed, results.path)


def _timed(task: AnyTask, subject: Subject, settings: TaskSettings, results: Results, show: Show) -> dict[str, Any]:
    begin = time.monotonic()
    result = _measured(task, subject, settings, results, show)
    facts = {"settings": settings_of(settings), "batch_size": subject.batch_size}
    return {**result, **facts, "seconds": round(time.monotonic() - begin, 1), **provenance(subject.device)}


def describe(subject: Subject) -> dict[str, Any]:
    """The model, as JSON."""
    return {
        "name": subject.name,
        "fingerprint": subject.fingerprint,
        "type": subject.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "vocabulary": subject.vocab_size,
        "tokenizer": type(subject.tokenizer).__name__,
    }


def settings_of(settings: TaskSettings) -> dict[str, Any]:
    """Settings as JSON."""
    return {**asdict(settings), "data": None if settings.data is None else str(settings.data)}


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """The folder is ours and nobody else writes into it; a new one in which nothing came to be goes again."""
    if out.exists() and not (out / FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: not empty and without a {FILE}, so no evaluation made it; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{out}: another evaluation is writing there now; name another --out") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        if [path.name for path in out.iterdir()] == [".lock"]:
            shutil.rmtree(out)
        lock.release()


def _measured(task: AnyTask, subject: Subject, settings: TaskSettings, results: Results, show: Show) -> dict[str, Any]:
    header = {
        "task": task.name,
        "version": task.version,
        "model": subject.fingerprint,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "batch_size": subject.batch_size,
        **settings_of(settings),
        "max_length": subject.max_length,
    }
    name = re.sub(r"[^\w.-]+", "-", task.name) + ".jsonl"
    direct = isinstance(task, DirectTask)

    def open_journal() -> Journal:
        results.begin()
        return Journal(results.folder / ("parts" if direct else "samples") / name, header)

    try:
        if isinstance(task, DirectTask):
            found = task.measure(subject, settings, Parts(open_journal, show))
            write_lines(results.folder / "samples" / name, [header, *found["samples"]])
            return _result(task, found, len(found["samples"]), {})
        return _ask(task, subject, settings, open_journal, show)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{task.name}: {subject.batch_size} rows do not fit the memory of {subject.device}; use a smaller "
            "--batch-size, --max-length or --lengths"
        ) from None


class Parts:
    """The `Progress` of a direct task; its parts are kept in a journal, which is opened when the first one is due."""

    def __init__(self, open_journal: Callable[[], Journal], show: Show) -> None:
        self._open_journal = open_journal
        self._show = show

    @cached_property
    def _journal(self) -> Journal:
        return self._open_journal()

    @cached_property
    def _kept(self) -> dict[str, Any]:
        return {record["part"]: record["value"] for record in self._journal.records}

    def __call__(self, done: int, total: int) -> None:
        self._show(done, total, "")

    def once(self, key: str, measure: Callable[[], Value]) -> Value:
        """The value kept under `key`, else what `measure` gives, kept at once."""
        if key not in self._kept:
            self._kept[key] = finite(measure())
            self._journal.append([{"part": key, "value": self._kept[key]}])
        value: Value = self._kept[key]
        return value


def _ask(
    task: Task, subject: Subject, settings: TaskSettings, open_journal: Callable[[], Journal], show: Show
) -> dict[str, Any]:
    samples = task.samples(subject.text, settings)
    total = len(samples) if isinstance(samples, Sized) else settings.limit or 0
    places: dict[str, int] = {}
    scored: list[Scored] = []
    journal: Journal | None = None
    for batch in _batches(_numbered(task.name, samples, places), subject.batch_size):
        if journal is None:
            journal = open_journal()
            kept = {record["id"]: record for record in journal.records}
        if any(sample.id not in kept for sample in batch):
            new = [record for record in _answers(task, subject, batch) if record["id"] not in kept]
            journal.append(new)
            kept.update({record["id"]: record for record in new})
        scored += [_scored(journal.path, sample, kept[sample.id]) for sample in batch]
        show(len(scored), max(total, len(scored)) if total else 0, "")
    if not scored:
        raise DataError(f"{task.name}: there is not one sample; nothing was measured")
    scored.sort(key=lambda each: places[each.sample.id])
    return _result(task, task.summarise(scored), len(scored), spread(scored))


def _numbered(task: str, samples: Iterable[Sample], places: dict[str, int]) -> Iterator[Sample]:
    """The samples, their places noted by id."""
    for sample in samples:
        if sample.id in places:
            raise DataError(f"{task}: the sample id {sample.id!r} comes twice")
        places[sample.id] = len(places)
        yield sample


def _result(
    task: AnyTask, found: Mapping[str, Any], samples: int, spreads: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    metrics = finite(found["metrics"])
    return {
        "version": task.version,
        "main_metric": task.main_metric,
        "metrics": metrics,
        "errors": found.get("errors") or _errors(metrics, spreads),
        "tables": found.get("tables", {}),
        "samples": samples,
        "scores": spreads,
    }


def _errors(metrics: Mapping[str, Any], spreads: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Standard errors of the metrics that are the mean of a score, in percent or not."""
    errors = {}
    for name in metrics.keys() & spreads.keys():
        value, mean, error = metrics[name], spreads[name]["mean"], spreads[name]["standard_error"]
        for scale in (1, 100):  # official scores are rounded to two decimals
            if None not in (value, error) and math.isclose(value, scale * mean, rel_tol=1e-3, abs_tol=0.006):
                errors[name] = scale * error
    return errors


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Samples that are answered together: alike in how they are generated, and of like length.

    What a batch holds depends on the samples and `size` alone, never on what is answered already: a row's last digits
    may depend on its neighbours, and a resumed evaluation must find what an undisturbed one would.
    """
    stream = iter(samples)
    while window := list(islice(stream, WINDOW * size)):
        window.sort(key=lambda sample: (_manner(sample), -len(sample.prompt)))
        for _, alike in groupby(window, key=_manner):
            rows = list(alike)
            yield from (rows[begin : begin + size] for begin in range(0, len(rows), size))


def _manner(sample: Sample) -> tuple[int, tuple[str, ...], bool, bool]:
    return sample.max_new_tokens, sample.stop, sample.chat, sample.never_empty


def _answers(task: Task, subject: Subject, batch: Sequence[Sample]) -> list[dict[str, Any]]:
    first = batch[0]
    rows = [subject.prompt_ids(sample.prompt, sample.chat) for sample in batch]
    outputs = subject.continue_ids(rows, first.max_new_tokens, first.stop, never_empty=first.never_empty)
    return [
        {
            "id": sample.id,
            "prompt": _digest(sample.prompt),
            "prompt_tokens": len(row),
            "output": output,
            "scores": task.score(sample, output),
            "references": list(sample.references),
            "facts": dict(sample.facts),
        }
        for sample, row, output in zip(batch, rows, outputs, strict=True)
    ]


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _scored(path: Path, sample: Sample, record: Mapping[str, Any]) -> Scored:
    if record["prompt"] != _digest(sample.prompt):
        raise ConfigError(
            f"{path}: sample {sample.id} was asked another question then; the data have changed: name another --out"
        )
    return Scored(replace(sample, prompt=""), record["output"], record["scores"])
