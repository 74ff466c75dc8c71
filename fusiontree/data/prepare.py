"""From text to token stores: into the cache folder for lazy sources, into a folder of the user's for static ones.

A lazy source is tokenised whole on first use rather than document by document on each access: the packing of an epoch
needs every document's length in tokens, so the work has to be done once anyway, and 2 bytes per token are cheaper to
keep than to compute again for every row. The result is found again by files (path, size, time), settings and tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from fusiontree.data.config import SourceConfig
from fusiontree.data.locks import locked
from fusiontree.data.parts import Part, divide, make_parts, parts_of
from fusiontree.data.progress import byte_progress
from fusiontree.data.records import BadRecords
from fusiontree.data.sources import expand, read_source
from fusiontree.data.store import VERSION, StoreWriter, TokenStore
from fusiontree.data.tokenizer import tokenise, tokenizer_hash
from fusiontree.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where tokenised text is kept: the argument, $FUSIONTREE_CACHE, or fusiontree/ in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("FUSIONTREE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusiontree"


def prepare_static(
    sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast, out_dir: str | Path, workers: int = 1
) -> TokenStore:
    """Tokenise sources into `out_dir`, to be used as `SourceConfig(path=out_dir, mode="static")`.

    The folder appears whole or not at all: after an interruption call it again and it goes on, with the loss of at most
    some 16 MB per worker; called again with the same text and tokenizer it returns what is there. The result is the
    same for any number of worker processes. Raises DataError when the folder holds something else.
    """
    if not sources:
        raise DataError("no sources to prepare")
    for source in sources:
        if source.weight is not None:
            raise ConfigError(f"{source.path}: weights belong to training; prepare each source into its own folder")
    folder = Path(out_dir).expanduser()
    key = _key(sources, tokenizer)
    with locked(folder):
        if folder.is_dir() and any(folder.iterdir()):
            store = TokenStore(folder)
            if store.meta.get("key") != key:
                raise DataError(f"{folder}: holds tokens of other text or another tokenizer; name another folder")
            return store
        parts = divide(sources, folder, key)
        if len(parts) == 1:
            return _build(sources, tokenizer, folder, key)
        return _build_in_parts(sources, tokenizer, folder, key, parts, workers)


def open_source(
    source: SourceConfig, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path | None = None
) -> TokenStore:
    """The tokens of a source: a static one's folder, or a lazy one's from the cache, where they are put if missing."""
    if source.mode == "static":
        store = TokenStore(Path(source.path).expanduser())
        if store.meta.get("tokenizer_hash") != tokenizer_hash(tokenizer):
            raise DataError(f"{source.path}: was prepared with another tokenizer; prepare it again with this one")
    else:
        store = _cached(source, tokenizer, cache_folder(cache_dir))
    store.bad_records.check(source.path, source.max_bad_fraction)
    return store


def clean_cache(days: float, cache_dir: str | Path | None = None) -> tuple[int, int]:
    """Remove tokens of lazy sources that no run has opened for so many days; gives how many stores and bytes.

    A run that has one open keeps it; what is needed again is made again. Raises DataError when one cannot be removed.
    """
    count = size = 0
    for folder in sorted((cache_folder(cache_dir) / "tokens").glob("*/")):
        if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) <= 86400 * days:
            continue
        with locked(folder.with_suffix("")):  # a draft (.tmp) is guarded by the lock of what it becomes
            if not folder.exists():
                continue
            size += sum(path.stat().st_size for path in folder.iterdir())
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise DataError(f"{folder}: cannot be removed: {error.strerror or error}") from error
            count += 1
    return count, size


def _cached(source: SourceConfig, tokenizer: PreTrainedTokenizerFast, cache: Path) -> TokenStore:
    key = _key([source], tokenizer)
    folder = cache / "tokens" / key[:32]
    if folder.exists():
        with suppress(DataError):  # a damaged one is dealt with by one process
            store = TokenStore(folder)
            with suppress(OSError):  # another user's cache
                os.utime(folder)  # the time of last use, for `clean_cache`
            return store
    with locked(folder):  # several processes ask at once: one works, the others find its result
        if folder.exists():
            try:
                return TokenStore(folder)
            except DataError as error:
                logger.warning("%s; tokenising again", error)
                shutil.rmtree(folder)
        return _build([source], tokenizer, folder, key)


def _build(sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast, folder: Path, key: str) -> TokenStore:
    bad = BadRecords()
    total = sum(path.stat().st_size for source in sources for path in expand(source))
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    with StoreWriter(folder, vocabulary) as writer, byte_progress("tokenising", total) as advance:
        for source in sources:
            counted = BadRecords()
            for document, ids in tokenise(read_source(source, counted, advance), tokenizer):
                writer.append(document, ids)
            bad.merge(counted)
        writer.finish(key, tokenizer_hash(tokenizer), bad)
    return TokenStore(folder)


def _build_in_parts(
    sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast, folder: Path, key: str, parts: Sequence[Part],
    workers: int,
) -> TokenStore:  # fmt: skip
    bad = BadRecords()
    with byte_progress("tokenising", sum(part.size for part in parts)) as advance:
        make_parts(parts, sources, tokenizer, min(workers, len(parts)), advance)
    with StoreWriter(folder, max(tokenizer.get_vocab().values()) + 1) as writer:
        for number, source in enumerate(sources):
            counted = BadRecords()
            for store, account in parts_of(parts, number):
                if store is not None:
                    writer.copy(store)
                counted.merge(account)
            counted.check(source.path, source.max_bad_fraction)
            bad.merge(counted)
        writer.finish(key, tokenizer_hash(tokenizer), bad)
    shutil.rmtree(parts[0].folder.parent)
    if bad.count:
        logger.warning("%s: %s", ", ".join(source.path for source in sources), bad.summary())
    return TokenStore(folder)


def _key(sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything the store depends on; files count by path, size and time, so that nothing has to be read."""
    parts: list[object] = [VERSION, tokenizer_hash(tokenizer)]
    for source in sources:
        parts.append(source.model_dump(exclude={"path", "weight", "mode", "max_bad_fraction", "subset", "split"}))
        parts.append([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in expand(source)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
