"""The folder of a grid: one process at a time, one grid for ever, and results.json whole after every run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusiontree.errors import ConfigError, DataError, FusionTreeError
from fusiontree.eval.journal import finite, write_whole
from fusiontree.lab.grid.config import GridConfig
from fusiontree.lab.grid.matching import Contender
from fusiontree.models.json_files import read_json

FILE, RUNS, FORMAT = "results.json", "runs", "fusiontree-grid"
MAX_BYTES = 1 << 28
# What may change when a grid goes on: more seeds, more architectures, another machine.
FREE = ("seeds", "architectures.", "changes.", "system.", "data.num_workers", "data.cache_dir")

Content = dict[str, Any]


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """The folder is ours and nobody else works in it; a new one in which no grid came to be goes again.

    ConfigError when it holds something else or another process is at work there, DataError when it cannot be written.
    """
    new = not any(path.name != ".lock" for path in _listed(out))
    if not new and not (out / FILE).exists():
        raise ConfigError(f"{out}: not empty and without a {FILE}, so no grid made it; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{out}: another process is at work on this grid; name another --out") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    except FusionTreeError:
        if new and not any((out / RUNS).glob("*/*/config.yaml")):  # which a run writes when it begins
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        lock.release()


def _listed(out: Path) -> list[Path]:
    if not out.exists():
        return []
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder")
    return list(out.iterdir())


class Results:
    """results.json: settings, sizes, the sweep, every finished run, and what was measured in turns."""

    def __init__(self, out: Path, kind: str, grid: GridConfig) -> None:
        self.path = out / FILE
        self.content: Content = {
            "format": FORMAT,
            "version": 1,
            "kind": kind,
            "grid": grid.model_dump(mode="json"),
            "tokenizer": None,
            "contenders": {},
            "sweep": {},
            "runs": {},
            "failed": {},
            "turns": {},
            "started": [],
        }
        if self.path.exists():
            self._take_up(read_results(self.path))
        else:
            self.write()

    def _take_up(self, saved: Content) -> None:
        """Go on with what an earlier start left; ConfigError when it was another grid."""
        now = self.content
        before, wanted = ({"kind": each["kind"], **_binding(each)} for each in (saved, now))
        for key in sorted(before.keys() | wanted.keys()):
            if before.get(key) != wanted.get(key):
                raise self._other(f"{key} was {before.get(key)!r}, now it is {wanted.get(key)!r}")
        self.content = {**saved, "grid": now["grid"]}

    def enter(self, contenders: Mapping[str, Contender], tokenizer: str, start: Content) -> None:
        """Take contenders and tokenizer in and write the file; ConfigError when they have changed since they ran."""
        if self.content["tokenizer"] not in (None, tokenizer):
            raise self._other("its runs have another tokenizer")
        self.content["tokenizer"] = tokenizer
        known = self.content["contenders"]
        for name, contender in contenders.items():
            plain = finite(json.loads(json.dumps(asdict(contender))))
            for key, value in known.get(name, plain).items():
                if value != plain[key]:
                    raise self._other(f"{name}: {key} was {value!r}, now it is {plain[key]!r}")
            known[name] = plain
        self.content["started"].append(start)
        self.write()

    def write(self) -> None:
        """The whole file, at once."""
        write_whole(self.path, json.dumps(finite(self.content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def _other(self, difference: str) -> ConfigError:
        return ConfigError(f"{self.path.parent}: belongs to another grid: {difference}; name another --out")


def read_results(path: Path) -> Content:
    """The content of a results.json; ConfigError when no grid of this version wrote it."""
    content = read_json(path, MAX_BYTES, ConfigError)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != 1:
        raise ConfigError(f"{path}: is not the result of a grid")
    return content


def _binding(content: Content) -> Content:
    flat = dict(_flat(content["grid"]))
    return {key: value for key, value in flat.items() if not key.startswith(FREE)}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
