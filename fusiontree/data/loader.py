"""Loader: batches by global sample index, so that the data position is one number and resume is exact.

The endless stream is made of blocks of `block_length` tokens. Rows are blocks, or, in the early stages of a length
curriculum, equal parts of blocks: sample i of length L is tokens [i L, (i + 1) L) of the stream, whatever came before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusiontree.data.ahead import prepared_by, worker_name
from fusiontree.data.batch import FILLER, Batch, collate
from fusiontree.data.config import DataConfig
from fusiontree.data.mixture import Interleave, Mixture, Place
from fusiontree.data.records import BadRecords
from fusiontree.data.rows import Part, Reader
from fusiontree.data.shuffle import make_key
from fusiontree.data.splits import Split
from fusiontree.data.streaming import StreamRows
from fusiontree.errors import ConfigError, DataError, FusionTreeError

logger = logging.getLogger(__name__)
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

    @property
    def global_batch(self) -> int:
        """Rows of all ranks."""
        return self.batch_size * self.world_size


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
        shape: Shape, block_length: int, facts: Facts, *, pad: int, seed: int,
    ) -> None:  # fmt: skip
        self._readers, self._shape, self._packing, self._pad = readers, shape, config.packing, pad
        self._workers, self._split, self._seed, self._block = config.num_workers, split, seed, block_length
        self._endless = split == "train"
        order = seed if self._endless else VALIDATION_ORDER
        self._streams = {number: reader for number, reader in enumerate(readers) if isinstance(reader, StreamRows)}
        self._mixture: Mixture | Interleave = (
            Interleave(readers, weights or [1.0] * len(readers), make_key(order))
            if self._streams
            else Mixture(readers, weights, make_key(order), bucketed=not config.packing)
        )
        self.tokens_per_epoch = facts.tokens
        """Tokens of all sources but streams, each document counted once."""
        self._bad_records, self._allow_changed = facts.bad_records, config.allow_changed
        self.fingerprint = facts.fingerprint
        """Changes when the text, the tokenizer, the held-out part, the weights or what is synthetic change."""
        self._position = 0
        self._check_size()

    @property
    def position(self) -> int:
        """Global sample index of the next batch."""
        return self._position

    @property
    def samples_per_epoch(self) -> int:
        """Rows until every one has come once (with weights: as many; with streams, which have no end: 4,096 blocks)."""
        return self._mixture.size * (self._block // self._shape.sequence_length)

    @property
    def bad_records(self) -> BadRecords:
        """What was left out when the sources were read; of streams, so far."""
        bad = BadRecords()
        for part in (self._bad_records, *(reader.stream.bad_records for reader in self._streams.values())):
            bad.merge(part)
        return bad

    def resize(self, sequence_length: int, batch_size: int) -> None:
        """Go on with rows of another length, a divisor of the block length, at the same token of the stream.

        Raises ConfigError for a length that does not divide, DataError when no row of it would begin there.
        """
        shape = Shape(sequence_length, batch_size, self._shape.rank, self._shape.world_size)
        shape.check()
        if self._block % sequence_length or not self._packing:
            raise ConfigError(f"sequence_length {sequence_length}: must divide {self._block}, and needs packing")
        position = self._converted(self._position, self._shape.sequence_length, sequence_length)
        self._shape, self._position = shape, position
        self._check_size()

    def __iter__(self) -> Iterator[Batch]:
        if not self._endless:
            self._position = 0
        with prepared_by(self._workers, self._batch) as fetch:
            while self._endless or self._position < self.samples_per_epoch:
                position, shape = self._position, self._shape
                batch = fetch(self._next_requests(position, shape))
                self._position = position + shape.global_batch
                for source, reader in self._streams.items():
                    reader.release(self._stream_row(source))
                yield batch

    def __len__(self) -> int:
        """Batches of a validation pass; an endless loader has no length (TypeError)."""
        if self._endless:
            raise TypeError("a training loader never ends; see samples_per_epoch")
        return -(-self.samples_per_epoch // self._shape.global_batch)

    def batch_at(self, position: int) -> Batch:
        """This rank's batch of the step that begins at a global sample index.

        A validation pass ends with a smaller batch, equally large on every rank; a rank for which no sample is left
        gets rows of padding whose sample id is -1.
        """
        return self._batch((position, self._shape))

    def origins(self, sample: int) -> list[str]:
        """`file:line` of each document in a sample, to find the text behind a loss spike."""
        place, part = self._place(sample, self._shape.sequence_length)
        return self._readers[place.source].origins(place.row, place.turn, part)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "position": self._position,
            "row_length": self._shape.sequence_length,
            **self._identity(),
            **({"streams": self._stream_states()} if self._streams else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood. Raises DataError when the next batch would be another than the one due.

        With `data.allow_changed` the position is taken over although the text is another.
        """
        position: Any = state.get("position")
        length: Any = state.get("row_length", state.get("sequence_length"))
        whole = isinstance(position, int) and isinstance(length, int) and bool not in (type(position), type(length))
        if state.get("version") != STATE_VERSION or not whole or position < 0 or length < 1:
            raise DataError(f"data position: not a loader state of version {STATE_VERSION} with a position from 0")
        for name, now in self._identity().items():
            if state.get(name) != now:
                self._refuse(name, state.get(name), now, position)
        if state.get("sequence_length") == self._block:
            position = self._converted(position, length, self._shape.sequence_length)
        self._position = position
        for source, reader in self._streams.items():
            reader.restore(self._stream_row(source), _stream_state(state, source))

    def _refuse(self, name: str, before: Any, now: Any, position: int) -> None:
        if name != "fingerprint":
            raise DataError(
                f"data position: {name} was {before} when it was saved and is {now} now; undo the change, or start a "
                "new run"
            )
        if not self._allow_changed:
            raise DataError(
                f"data position: the text, tokenizer or mixture changed since it was saved (fingerprint {before}, now "
                f"{now}); undo the change, start a new run, or go on at the same position with data.allow_changed: true"
            )
        logger.warning("the text, tokenizer or mixture changed; going on at sample %d as asked", position)

    def _stream_states(self) -> dict[str, Any]:
        return {str(number): reader.state_at(self._stream_row(number)) for number, reader in self._streams.items()}

    def _stream_row(self, source: int) -> int:
        """The first row of a stream that is not used up."""
        assert isinstance(self._mixture, Interleave)
        return self._mixture.drawn_before(source, self._position * self._shape.sequence_length // self._block)

    def _identity(self) -> dict[str, Any]:
        values = (self._split, self._block, self._packing, self._seed, self.fingerprint)
        return dict(zip(FOLLOWED, values, strict=True))

    def _converted(self, position: int, old: int, new: int) -> int:
        converted, rest = divmod(position * old, new)
        if rest:
            raise DataError(f"data position: token {position * old} is not the beginning of a row of {new}")
        return converted

    def _next_requests(self, position: int, shape: Shape) -> list[tuple[int, Shape]]:
        """The step at `position` and those that may be prepared meanwhile."""
        end = position + shape.global_batch * (2 * self._workers + 1)
        end = end if self._endless else min(end, self.samples_per_epoch)
        return [(begin, shape) for begin in range(position, end, shape.global_batch)]

    def _batch(self, request: tuple[int, Shape]) -> Batch:
        position, shape = request
        rows, end = shape.batch_size, None if self._endless else self.samples_per_epoch
        if end is not None:
            rows = min(rows, -(-(end - position) // shape.world_size))
        first = position + shape.rank * rows
        samples = [sample if end is None or sample < end else FILLER for sample in range(first, first + rows)]
        documents = [self._tokens(sample, shape.sequence_length) for sample in samples]
        return collate(documents, samples, shape.sequence_length, self._pad, self._packing)

    def _tokens(self, sample: int, length: int) -> list[Any]:
        """Documents of a sample. Raises DataError that names worker, sample and text, whatever went wrong."""
        if sample == FILLER:
            return []
        place, part = self._place(sample, length)
        reader = self._readers[place.source]
        try:
            return reader.read(place.row, place.turn, part)
        except MemoryError:
            raise
        except Exception as error:  # in a thread of its own, so that the place would be lost with the traceback
            reason = str(error) if isinstance(error, FusionTreeError) else f"{type(error).__name__}: {error}"
            origins = reader.origins(place.row, place.turn, part)
            raise DataError(f"{worker_name()}, sample {sample} ({origins[0]} to {origins[-1]}): {reason}") from error

    def _place(self, sample: int, length: int) -> tuple[Place, Part]:
        parts = self._block // length
        block, number = divmod(sample, parts)
        return self._mixture.place(block), Part(number, parts)

    def _check_size(self) -> None:
        shape = self._shape
        if self._endless and not self._streams and self.samples_per_epoch < shape.global_batch:
            raise DataError(
                f"data.train: {self.tokens_per_epoch} tokens make {self.samples_per_epoch} rows of up to "
                f"{shape.sequence_length}, fewer than one step needs (batch size {shape.batch_size} × "
                f"{shape.world_size} processes); give more text, a smaller batch or shorter rows"
            )


def _stream_state(state: dict[str, Any], source: int) -> dict[str, Any]:
    saved: dict[str, Any] | None = (state.get("streams") or {}).get(str(source))
    if saved is None:
        raise DataError("data position: the state says nothing of a streaming source; start a new run")
    return saved
