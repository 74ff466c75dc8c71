"""Preparing much text in parts: several processes at once, and parts that are done are kept over an interruption.

A part is a run of files of one source, or a stretch of a large one, some 16 MB, made into a store of its own beside the
target (`out`.parts); at the end the parts are copied one after the other, so the result is to the byte what one process
would have made in one go. Compressed files, Parquet and text without a separator are not cut, nor is a file of which
only the first documents are wanted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from fusiontree.data.config import SourceConfig
from fusiontree.data.formats import format_of, separator_of
from fusiontree.data.locks import locked
from fusiontree.data.progress import byte_progress
from fusiontree.data.records import BadRecords, Document
from fusiontree.data.sources import expand, read_files
from fusiontree.data.store import StoreWriter, TokenStore
from fusiontree.data.stretches import Stretch, cut
from fusiontree.data.tokenizer import tokenise, tokenizer_hash
from fusiontree.data.workers import Advance, At, in_processes

PART_BYTES = 16 << 20


class Part(NamedTuple):
    """Some files of source number `source`, or a stretch of one, and the folder that their tokens go to."""

    source: int
    files: tuple[Path, ...]
    stretch: Stretch | None
    folder: Path

    @property
    def size(self) -> int:
        """Bytes to be read."""
        if self.stretch is not None:
            return self.stretch.end - self.stretch.begin
        return sum(path.stat().st_size for path in self.files)


def divide(sources: Sequence[SourceConfig], folder: Path, key: str) -> list[Part]:
    """Parts of the sources' files in order, most of them about PART_BYTES large."""
    root = folder.with_name(folder.name + ".parts")
    files = [(number, source, path) for number, source in enumerate(sources) for path in expand(source)]
    with byte_progress("counting lines", sum(path.stat().st_size for _, _, path in files)) as advance:
        cuts = [(number, path, _stretches(path, source, advance)) for number, source, path in files]
    return [
        Part(number, paths, stretch, root / f"{key[:16]}-{PART_BYTES}-{index:05d}")
        for index, (number, paths, stretch) in enumerate(_pieces(cuts))
    ]


def _stretches(path: Path, source: SourceConfig, advance: Advance) -> list[Stretch]:
    """Where a file is to be cut; one stretch or none: not at all."""
    form = format_of(path)
    separator = separator_of(form, source)
    if separator is None or form.compression or form.kind == "parquet" or source.max_samples_per_file is not None:
        return []
    return cut(path, separator, PART_BYTES, advance)


def _pieces(
    cuts: Sequence[tuple[int, Path, Sequence[Stretch]]],
) -> Iterator[tuple[int, tuple[Path, ...], Stretch | None]]:
    """Files of a source that are not cut, together until they are large enough; and stretches, one by one."""
    together: list[Path] = []
    size = 0
    for index, (number, path, stretches) in enumerate(cuts):
        following = cuts[index + 1] if index + 1 < len(cuts) else None
        if len(stretches) > 1:
            yield from ((number, (path,), stretch) for stretch in stretches)
            continue
        together.append(path)
        size += path.stat().st_size
        if size >= PART_BYTES or following is None or following[0] != number or len(following[2]) > 1:
            yield number, tuple(together), None
            together, size = [], 0


def make_parts(
    parts: Sequence[Part], sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast, workers: int,
    advance: Advance,
) -> None:  # fmt: skip
    """Make the parts that are not there yet. Raises DataError when one cannot be made or a worker dies."""
    missing = [part for part in parts if not _is_done(part)]
    advance(sum(part.size for part in parts) - sum(part.size for part in missing))
    work = partial(make_part, tuple(sources), tokenizer)
    try:
        if workers > 1:
            in_processes(work, missing, workers, advance)
            return
        for part in missing:
            work(part, advance, lambda place: None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again: it keeps the parts that are done") from None


def make_part(
    sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast, part: Part, advance: Advance, at: At
) -> None:
    """Tokenise a part unless it is there; one without a document leaves only its account of bad records."""
    with locked(part.folder):  # a killed run's worker may still be at it
        if not _is_done(part):
            _write_part(part, sources[part.source], tokenizer, advance, at)


def _write_part(part: Part, source: SourceConfig, tokenizer: PreTrainedTokenizerFast, advance: Advance, at: At) -> None:
    bad = BadRecords()
    documents = _said(read_files(part.files, source, bad, advance, part.stretch), at)
    with StoreWriter(part.folder, max(tokenizer.get_vocab().values()) + 1) as writer:
        for document, ids in tokenise(documents, tokenizer):
            writer.append(document, ids)
        if bad.documents:
            writer.finish("part", tokenizer_hash(tokenizer), bad)
    if not bad.documents:
        note = _empty(part)
        draft = note.with_name(note.name + ".tmp")
        draft.write_text(json.dumps(bad.to_json()), encoding="utf-8")
        os.replace(draft, note)


def _said(documents: Iterator[Document], at: At) -> Iterator[Document]:
    for document in documents:
        at(f"{document.path}:{document.line}")
        yield document


def parts_of(parts: Sequence[Part], source: int) -> Iterator[tuple[TokenStore | None, BadRecords]]:
    """Store (None: no documents) and account of each part of a source, in order."""
    for part in parts:
        if part.source == source:
            if _empty(part).exists():
                yield None, BadRecords(**json.loads(_empty(part).read_text(encoding="utf-8")))
            else:
                store = TokenStore(part.folder)
                yield store, store.bad_records


def _empty(part: Part) -> Path:
    return part.folder.with_name(part.folder.name + ".empty.json")


def _is_done(part: Part) -> bool:
    return part.folder.exists() or _empty(part).exists()
