"""Several models measured at several prompt lengths and batch sizes: speed in turns, peak memory, kept size by size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusiontree.errors import ConfigError
from fusiontree.eval.journal import Journal, finite, write_whole
from fusiontree.eval.provenance import provenance
from fusiontree.eval.results import FILE
from fusiontree.eval.run import Show, alone, silent
from fusiontree.eval.subject import context_limit, learned_positions
from fusiontree.eval.system.memory import (
    MemoryResult,
    NoRoomError,
    Source,
    measure_memory,
    measure_memory_apart,
    out_of_memory_is_one_line,
    uncounted,
)
from fusiontree.eval.system.speed import SpeedResult, measure_speed
from fusiontree.models.fingerprint import model_fingerprint

KEPT = "rows.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchSettings:
    """Prompt lengths in tokens, rows at once, tokens to write, and how often; `seed` draws the prompts."""

    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: int = 64
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"--lengths": 1, "--batch-sizes": 1, "--new-tokens": 2, "--repeats": 1}
        given = (self.lengths, self.batch_sizes, (self.new_tokens,), (self.repeats,))
        for (flag, smallest), values in zip(least.items(), given, strict=True):
            if not values:
                raise ConfigError(f"{flag}: name at least one number")
            if min(values) < smallest:
                raise ConfigError(f"{flag} {min(values)}: at least {smallest}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(length, batch size), each once, small ones first."""
        return sorted({(length, rows) for length in self.lengths for rows in self.batch_sizes})


@dataclass(frozen=True)
class Contestant:
    """A model in memory and where it came from."""

    name: str
    source: Source
    model: Any

    @classmethod
    def load(cls, name: str, source: Source, device: str | torch.device | None) -> Contestant:
        return cls(name, source, source.load(device))

    def describe(self) -> dict[str, Any]:
        return {
            "place": self.source.place,
            "type": self.model.config.model_type,
            "fingerprint": model_fingerprint(self.model),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Outcome:
    """The rows that were asked for, all rows of the folder, and its `results.json`."""

    rows: list[Row]
    kept: list[Row]
    path: Path


def bench(
    contestants: Sequence[Contestant],
    settings: BenchSettings,
    out: Path,
    *,
    command: str = "",
    progress: Callable[[str], contextlib.AbstractContextManager[Show]] = silent,
) -> Outcome:
    """Measure every model at every size and keep the rows in `out`.

    A row holds `speed` (a SpeedResult) and `memory` (a MemoryResult), or why not as `error`: too long for the model, no
    room. Sizes that `out` holds are not measured again. ConfigError when it belongs to something else.
    """
    found = provenance(next(contestants[0].model.parameters()).device)
    stamp = {key: found[key] for key in ("date", "commit")}
    with alone(out):
        if (out / FILE).exists() and not (out / KEPT).exists():
            raise ConfigError(f"{out / FILE}: holds other results; name another --output")
        header = _header(contestants, settings, found)
        journal = Journal(out / KEPT, header)
        known = {_size(row) for row in journal.records}
        missing = [size for size in settings.sizes if size not in known]
        each = len(contestants) * (settings.repeats + 2)
        with progress("bench") as show:
            for place, (length, batch_size) in enumerate(missing):
                told = _Told(show, place * each, len(missing) * each, f"{batch_size} × {length:,}")
                rows = _measure(contestants, length, batch_size, settings, told)
                journal.append([{**row, **stamp} for row in rows])
                _write(out / FILE, {**header, "command": command, **found}, journal.records)
            show(len(missing) * each, len(missing) * each, "")
    kept = sorted(journal.records, key=_size)  # stable: the models stay as they were named
    return Outcome([row for row in kept if _size(row) in set(settings.sizes)], kept, out / FILE)


def _header(contestants: Sequence[Contestant], settings: BenchSettings, found: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two sizes to stand in one table."""
    return {
        "format": "fusiontree-bench",
        "version": 1,
        "models": {one.name: one.describe() for one in contestants},
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "machine": found["machine"],
        "versions": found["versions"],
    }


def _size(row: Row) -> tuple[int, int]:
    return row["length"], row["batch_size"]


def _write(path: Path, document: Mapping[str, Any], rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=_size)  # stable: the models stay as they were named
    text = json.dumps(finite({**document, "rows": ordered}), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


class _Told:
    """Counts the steps of one size to `show`."""

    def __init__(self, show: Show, done: int, total: int, size: str) -> None:
        self.show, self.done, self.total, self.size = show, done, total, size

    def __call__(self, name: str, step: str) -> None:
        self.show(self.done, self.total, f"{self.size}: {name}, {step}")
        self.done += 1


def _measure(
    contestants: Sequence[Contestant], length: int, batch_size: int, settings: BenchSettings, told: _Told
) -> list[Row]:
    """A row per model. Memory first: what does not fit is known before the models take turns."""
    rows: dict[str, Row] = {}
    for one in contestants:
        row: Row = {"model": one.name, "length": length, "batch_size": batch_size, "speed": None, "memory": None}
        rows[one.name] = {**row, **_length_words(one.model, length, settings.new_tokens)}
        if rows[one.name]["error"] is None:
            told(one.name, "memory")
            _add_memory(rows[one.name], one, settings)
    models = {one.name: one.model for one in contestants if rows[one.name]["error"] is None}
    speeds, errors = _speeds(models, length, batch_size, settings, told)
    for name, row in rows.items():
        row["speed"] = asdict(speeds[name]) if name in speeds else None
        row["error"] = errors.get(name, row["error"])
    return list(rows.values())


def _length_words(model: Any, length: int, new_tokens: int) -> dict[str, str | None]:
    """`error` when the model has no positions for prompt and answer, `note` when it was not made for so many."""
    limit, fed = context_limit(model.config, None), length + new_tokens - 1  # the last token is never fed back
    if limit is None or fed <= limit:
        return {"note": None, "error": None}
    if not learned_positions(model):
        return {"note": f"beyond the {limit:,} positions its config states", "error": None}
    said = f"{length:,} tokens and {new_tokens:,} new ones: it has a learned table of {limit:,} positions"
    return {"note": None, "error": f"{said}; a prompt of at most {max(0, limit - new_tokens + 1):,} fits"}


def _add_memory(row: Row, one: Contestant, settings: BenchSettings) -> None:
    if (why := uncounted(next(one.model.parameters()).device)) is not None:
        row["note"] = "; ".join(filter(None, (row["note"], why)))
        return
    try:
        memory = _memory(one, row["length"], row["batch_size"], settings)
        _check_room(memory, one.model)
        row["memory"] = asdict(memory)
    except NoRoomError as error:
        row["error"] = str(error)
    except (RuntimeError, IndexError, ValueError) as error:
        if row["note"] is None:
            raise
        row["error"] = f"{row['note']}, where it fails: {str(error).strip().splitlines()[-1]}"


def _memory(one: Contestant, length: int, batch_size: int, settings: BenchSettings) -> MemoryResult:
    if next(one.model.parameters()).device.type != "cpu":
        return measure_memory(one.model, length, settings.new_tokens, batch_size, seed=settings.seed)
    threads = torch.get_num_threads()
    return measure_memory_apart(
        one.source, length, settings.new_tokens, batch_size, threads=threads, seed=settings.seed
    )


def _check_room(memory: MemoryResult, model: Any) -> None:
    """Speed is measured where all models are loaded: on a CPU a lack of memory would end this process."""
    meminfo = Path("/proc/meminfo")
    if next(model.parameters()).device.type != "cpu" or not meminfo.exists():
        return
    free = next(
        1024 * int(line.split()[1])
        for line in meminfo.read_text(encoding="utf-8").splitlines()
        if line.startswith("MemAvailable")
    )
    needed = memory.peak - memory.weights
    if needed > free:
        raise NoRoomError(
            f"out of memory: {needed / 1e9:.1f} GB are needed beside the models, {free / 1e9:.1f} are free"
        )


def _speeds(
    models: Mapping[str, Any], length: int, batch_size: int, settings: BenchSettings, told: _Told
) -> tuple[dict[str, SpeedResult], dict[str, str]]:
    """Speeds by name, and why others have none: a model that finds no room leaves, the rest take their turns anew."""
    left, errors = dict(models), dict[str, str]()
    while left:
        at = ""

        def turn(name: str, number: int) -> None:
            nonlocal at
            at = name
            told(name, "warm-up" if number < 0 else f"round {number + 1} of {settings.repeats}")

        try:
            with out_of_memory_is_one_line():
                return measure_speed(
                    left, length, settings.new_tokens, settings.repeats,
                    batch_size=batch_size, seed=settings.seed, progress=turn,
                ), errors  # fmt: skip
        except NoRoomError as error:
            errors[at] = str(error)
            del left[at]
    return {}, errors
