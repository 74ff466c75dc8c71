"""What Hugging Face `datasets` reads: corpora on the hub by name, and local files, opened as streams."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from fusiontree.data.config import SourceConfig
from fusiontree.data.formats import COMPRESSIONS, JSONL, PARQUET, format_of
from fusiontree.data.sources import expand
from fusiontree.errors import DataError

EDGE_BYTES = 1 << 16
BUILDERS = {"jsonl": "json", "text": "text", "parquet": "parquet"}


def local_files(source: SourceConfig) -> list[Path] | None:
    """The files a path means, or None for a name on the hub. Raises DataError when it looks like files but is none."""
    name = source.path
    looks = name.startswith((".", "/", "~")) or any(sign in name for sign in "*?[")
    suffix = Path(name).suffix.lower() in (*JSONL, *COMPRESSIONS, PARQUET, ".txt")
    if looks or suffix or os.path.exists(name):
        return expand(source)
    return None


def open_stream(source: SourceConfig) -> Any:
    """A datasets.IterableDataset. Raises DataError when the package, the files or the hub cannot be had."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source.path}: streaming needs the package datasets; pip install 'fusiontree[data]'"
        ) from None
    files = local_files(source)
    try:
        if files is None:
            return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
        kinds = {format_of(path).kind for path in files}
        if len(kinds) > 1:
            raise DataError(
                f"{source.path}: files of several formats ({', '.join(sorted(kinds))}); one source for each"
            )
        kind = kinds.pop()
        settings = {"sample_by": "document"} if kind == "text" else {}
        names = [str(path) for path in files]
        return datasets.load_dataset(BUILDERS[kind], data_files=names, split="train", streaming=True, **settings)
    except DataError:
        raise
    except Exception as error:  # hub, network and reader errors share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = "on the Hugging Face hub" if files is None else "by datasets"
        raise DataError(f"{source.path}: cannot be opened {where}: {reason}") from error


def stream_fingerprint(source: SourceConfig) -> str:
    """Hash of the settings and, for local files, of their names, sizes, beginnings and ends."""
    digest = hashlib.sha256()
    said = source.model_dump_json(exclude={"path", "weight", "mode", "max_bad_fraction"})
    digest.update(said.encode())
    files = local_files(source)
    if files is None:
        digest.update(source.path.encode())
    for path in files or []:
        size = path.stat().st_size
        with path.open("rb") as handle:
            digest.update(f"{path.name}/{size}/".encode() + handle.read(EDGE_BYTES))
            handle.seek(max(size - EDGE_BYTES, 0))
            digest.update(handle.read(EDGE_BYTES))
    return digest.hexdigest()
