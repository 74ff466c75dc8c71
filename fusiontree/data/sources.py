"""Sources of documents: which files a path means, and the documents in them, in a fixed order."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fusiontree.data.config import SourceConfig
from fusiontree.data.formats import format_of, open_sections, parse
from fusiontree.data.records import BadRecords, Document, RecordError, Section
from fusiontree.data.stretches import Stretch
from fusiontree.errors import ConfigError, DataError

STDLIB = "stdlib"
NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_corpus() -> list[Path]:
    """Sorted .py files of the running Python's own standard library, without site-packages and test folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_CORPUS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"{STDLIB}: no .py files under {root}: this Python carries no sources, name your own files")
    return sorted(files)


def expand(source: SourceConfig) -> list[Path]:
    """Sorted files of a lazy source. Raises DataError when there are none or one of them is not readable text."""
    if source.path == STDLIB:
        return stdlib_corpus()
    pattern = os.path.expanduser(source.path)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    if os.path.isdir(pattern):
        prepared = (Path(pattern) / "meta.json").exists()
        hint = "set mode: static" if prepared else f"give a glob, such as {pattern}/**/*.txt"
        raise DataError(f"{source.path}: is a folder: {hint}")
    files = sorted({Path(name) for name in found if not os.path.isdir(name)})
    if not files:
        hub = "; a corpus on the hub can only be streamed" if source.mode == "streaming" else ""
        raise DataError(f"{source.path}: no such file, and nothing matches it as a pattern{hub}")
    for path in files:
        _check_file(path)
    return files


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: not an ordinary file")
    format_of(path)


def read_source(
    source: SourceConfig, bad: BadRecords, advance: Callable[[int], None] = lambda size: None
) -> Iterator[Document]:
    """Yield the usable documents of a lazy source in order, and count the others in `bad`.

    `advance` is told the bytes read of the files on disk. Raises DataError at the end when too much was bad.
    """
    if source.mode == "static":
        raise ConfigError(f"{source.path}: a static source holds tokens, not text; name the text files")
    yield from read_files(expand(source), source, bad, advance)
    bad.check(source.path, source.max_bad_fraction)


def read_files(
    files: Sequence[Path], source: SourceConfig, bad: BadRecords, advance: Callable[[int], None],
    stretch: Stretch | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Yield the usable documents of some files of a source and count the others, whatever their share.

    `stretch`: only this part of each file.
    """
    for path in files:
        before = bad.documents
        for section in open_sections(path, source, advance, stretch):
            document = read_section(path, section, source, bad)
            if document is not None:
                bad.documents += 1
                yield document
                if bad.documents - before == source.max_samples_per_file:
                    break


def read_texts(sources: Sequence[SourceConfig], max_bytes: int | None = None) -> Iterator[str]:
    """Yield the documents' text, source after source, of each at most its equal part of `max_bytes`.

    The files of a streaming source are read as those of a lazy one; DataError for a corpus on the hub.
    """
    for source in sources:
        left = max_bytes // len(sources) if max_bytes is not None else None
        for document in read_source(source, BadRecords()):
            yield document.text
            if left is not None:
                left -= document.size
                if left <= 0:
                    break


def read_section(path: Path, section: Section, source: SourceConfig, bad: BadRecords) -> Document | None:
    """The document in a stretch of a file between two separators; else what is wrong is counted in `bad`."""
    if section.size > source.max_document_bytes:
        reason = f"{section.size} bytes, longer than max_document_bytes {source.max_document_bytes}"
        bad.add(str(path), section.line, reason)
        return None
    if section.data is not None and not section.data.strip():
        bad.short += 1
        return None
    try:
        text = _parse(path, section, source, bad)
    except RecordError as error:
        bad.add(str(path), section.line, str(error))
        return None
    if len(text.strip()) < source.min_length:
        bad.short += 1
        return None
    return Document(text, str(path), section.line, section.offset, section.size)


def _parse(path: Path, section: Section, source: SourceConfig, bad: BadRecords) -> str:
    """The text of a record, mended where that is wanted and enough. Raises RecordError."""
    form = format_of(path)
    try:
        return parse(form, section, source.text_field)
    except RecordError:
        if source.invalid_text == "skip":
            raise
    text = parse(form, section, source.text_field, errors="replace")
    bad.mended += 1
    return text
