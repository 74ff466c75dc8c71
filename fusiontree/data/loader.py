"""Loader: batches by global sample index, so that the data position is one number and resume is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fusiontree.data.batch import FILLER, Batch, collate
from fusiontree.data.config import DataConfig
from fusiontree.data.mixture import Mixture
from fusiontree.data.records import BadRecords
from fusiontree.data.rows import Reader
from fusiontree.data.shuffle import make_key
from fusiontree.data.splits import Split
from fusiontree.errors import ConfigError, DataError

STATE_VERSION = 1
VALIDATION_ORDER = 0
FOLLOWED = ("split", "sequence_length", "packing", "seed", "fingerprint")


@dataclass(frozen=True)
class Shape:
    """Batch geometry: this rank's `batch_size` rows of at most `sequence_length` tokens, of `world_size` ranks."""

    sequence_length: int
    batch_size: int
    rank: int
    world_size: int

    def check(self) -> None:
        """Raise ConfigError when the numbers are impossible."""
        for name, least in (("sequence_length", 2), ("batch_size", 1), ("world_size", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least {least}")
        if self.rank >= self.world_size:
            raise ConfigError(f"rank {self.rank}: must be below world_size {self.world_size}")


@dataclass(frozen=True)
class Facts:
    """What is known of the sources: a hash of all that decides the rows, the tokens in them, what was left out."""

    fingerprint: str
    tokens: int
    bad_records: BadRecords


class Loader:
    """Batches of one split, by global sample index.

    Training never ends (see `samples_per_epoch`). Validation goes through its samples once, in an order that no seed
    changes, mixed so that its first few batches are a fair sample of all sources.

    Sample numbers `position … position + batch_size × world_size` make up one step, divided among the ranks in order,
    so the same samples come at the same step on another number of ranks with the same global batch.
    """

    def __init__(
        self, readers: Sequence[Reader], weights: Sequence[float] | None, config: DataConfig, split: Split,
        shape: Shape, facts: Facts, *, pad: int, seed: int,
    ) -> None:  # fmt: skip
        self._readers, self._shape, self._packing, self._pad = readers, shape, config.packing, pad
        self._workers, self._split, self._seed = config.num_workers, split, seed
        self._endless = split == "train"
        order = seed if self._endless else VALIDATION_ORDER
        self._mixture = Mixture(readers, weights, make_key(order), bucketed=not config.packing)
        self.samples_per_epoch = self._mixture.size
        """Rows until every one has come once (with weights: as many)."""
        self.tokens_per_epoch = facts.tokens
        """Tokens of all sources, each document counted once."""
        self.bad_records = facts.bad_records
        """What was left out when the sources were read."""
        self.fingerprint = facts.fingerprint
        """Changes when the text, the tokenizer, the held-out part, the weights or what is synthetic change."""
        self._position = 0
        self._check_size()

    @property
    def position(self) -> int:
        """Global sample index of the next batch."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        if not self._endless:
            self._position = 0
        with self._fetcher() as fetch:
            while self._endless or self._position < self.samples_per_epoch:
                position = self._position
                batch = fetch(position)
                self._position = position + self._global_batch
                yield batch

    def __len__(self) -> int:
        """Batches of a validation pass; an endless loader has no length (TypeError)."""
        if self._endless:
            raise TypeError("a training loader never ends; see samples_per_epoch")
        return -(-self.samples_per_epoch // self._global_batch)

    def batch_at(self, position: int) -> Batch:
        """This rank's batch of the step that begins at a global sample index.

        A validation pass ends with a smaller batch, equally large on every rank; a rank for which no sample is left
        gets rows of padding whose sample id is -1.
        """
        rows = self._shape.batch_size
        if not self._endless:
            rows = min(rows, -(-(self.samples_per_epoch - position) // self._shape.world_size))
        first = position + self._shape.rank * rows
        known = range(first, first + rows) if self._endless else range(first, min(first + rows, self.samples_per_epoch))
        samples = [*known] + [FILLER] * (rows - len(known))
        spans = [self._tokens(sample) if sample != FILLER else [] for sample in samples]
        return collate(spans, samples, self._shape.sequence_length, self._pad, self._packing)

    def origins(self, sample: int) -> list[str]:
        """`file:line` of each document in a sample, to find the text behind a loss spike."""
        place = self._mixture.place(sample)
        return self._readers[place.source].origins(place.row, place.turn)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain JSON values."""
        return {"version": STATE_VERSION, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any], allow_changed_data: bool = False) -> None:
        """Go on where another loader stood. Raises DataError when the next batch would be another than the one due.

        `allow_changed_data` takes over the position although the text, the order or the cutting is another.
        """
        position = state.get("position")
        if state.get("version") != STATE_VERSION or type(position) is not int or position < 0:
            raise DataError(f"data position: not a loader state of version {STATE_VERSION} with a position from 0")
        for name, now in self._identity().items():
            if state.get(name) != now and not allow_changed_data:
                raise DataError(
                    f"data position: {_said(name)} was {state.get(name)} when it was saved and is {now} now; "
                    "start a new run, or undo the change"
                )
        self._position = position

    def _identity(self) -> dict[str, Any]:
        values = (self._split, self._shape.sequence_length, self._packing, self._seed, self.fingerprint)
        return dict(zip(FOLLOWED, values, strict=True))

    @property
    def _global_batch(self) -> int:
        return self._shape.batch_size * self._shape.world_size

    def _tokens(self, sample: int) -> list[Any]:
        place = self._mixture.place(sample)
        return self._readers[place.source].read(place.row, place.turn)

    def _check_size(self) -> None:
        if self._endless and self.samples_per_epoch < self._global_batch:
            raise DataError(
                f"data.train: {self.tokens_per_epoch} tokens make {self.samples_per_epoch} rows of up to "
                f"{self._shape.sequence_length}, fewer than one step needs (batch size {self._shape.batch_size} × "
                f"{self._shape.world_size} processes); give more text, a smaller batch or shorter rows"
            )

    @contextmanager
    def _fetcher(self) -> Iterator[Callable[[int], Batch]]:
        if self._workers == 0:
            yield self.batch_at
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="fusiontree-data") as pool:
            try:
                yield _Ahead(self, pool, 2 * self._workers)
            finally:
                pool.shutdown(cancel_futures=True)


class _Ahead:
    """Fetches a batch and has the following ones prepared; a jump of the position drops what was prepared."""

    def __init__(self, loader: Loader, pool: ThreadPoolExecutor, depth: int) -> None:
        self._loader, self._pool, self._depth = loader, pool, depth
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, position: int) -> Batch:
        step = self._loader._global_batch
        wanted = range(position, position + step * (self._depth + 1), step)
        if not self._loader._endless:
            wanted = range(position, min(wanted.stop, self._loader.samples_per_epoch), step)
        self._pending = {
            begin: self._pending.get(begin) or self._pool.submit(self._loader.batch_at, begin) for begin in wanted
        }
        return self._pending.pop(position).result()


def _said(name: str) -> str:
    return "the text, tokenizer or mixture (fingerprint)" if name == "fingerprint" else name
