"""Official data files: found in a folder, a zip or on the hub, read whole, their fields checked."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.errors import DataError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")
# Hub that cannot be reached -> why: twenty tasks do not wait for it twenty times.
UNREACHABLE: dict[str, str] = {}


@dataclass(frozen=True)
class Source:
    """One table of a benchmark."""

    name: str  # of the file, without suffix: "qasper"; parts of it may be called qasper-00000-of-00002.parquet
    fields: tuple[str, ...]  # that every record must have
    where: str  # where people get it, for the error
    hub: Callable[[], Iterable[Record]]  # downloads it


def read_records(source: Source, data: Path | None) -> list[Record]:
    """All records of the table: from `data` (its file, a folder or zip that holds it) or, without it, from the hub.

    Raises DataError: not found, not readable, empty, a record without a field; where to get it.
    """
    try:
        records = list(source.hub()) if data is None else _on_disk(source.name, data)
    except DataError as error:
        raise DataError(f"{error}. Get it from {source.where} and name its folder with --data") from error
    if not records:
        raise DataError(f"{source.name}: holds no records")
    for number, record in enumerate(records, 1):
        missing = [name for name in source.fields if name not in record] if isinstance(record, dict) else source.fields
        if missing:
            raise DataError(f"{source.name}: record {number} has no {', '.join(missing)}; it is not the official file")
    return records


def from_hub(repository: str, member: str | None = None, **settings: Any) -> list[Record]:
    """Rows of a data set on the Hugging Face hub: `datasets.load_dataset(repository, **settings)`.

    With `member`: of that file in the repository's data.zip; `datasets` no longer runs the scripts that unpacked it.
    Raises DataError when the package or the hub cannot be had.
    """
    if repository in UNREACHABLE:
        raise DataError(UNREACHABLE[repository])
    try:
        if member is not None:
            from huggingface_hub import hf_hub_download

            archive = hf_hub_download(repository, "data.zip", repo_type="dataset", etag_timeout=10)
            return _on_disk(member, Path(archive))
        import datasets

        return list(datasets.load_dataset(repository, **settings))
    except ImportError:
        raise DataError(f"{repository}: needs the package datasets: pip install 'fusiontree[eval]'") from None
    except DataError:
        raise
    except Exception as error:  # hub, network and reader errors share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"{repository}: cannot be read from the Hugging Face hub: {reason}"
        if isinstance(error, ConnectionError | FileNotFoundError):
            UNREACHABLE[repository] = message
        raise DataError(message) from error


def _on_disk(name: str, data: Path) -> list[Record]:
    if not data.exists():
        raise DataError(f"{data}: does not exist")
    if data.is_dir():
        files = _chosen(name, [path.relative_to(data).as_posix() for path in sorted(data.rglob("*"))], data)
        return [record for file in files for record in _parse(data / file, (data / file).read_bytes())]
    if data.suffix == ".zip":
        try:
            with zipfile.ZipFile(data) as archive:
                files = _chosen(name, archive.namelist(), data)
                return [record for file in files for record in _parse(data / file, archive.read(file))]
        except zipfile.BadZipFile as error:
            raise DataError(f"{data}: not a whole zip file: {error}") from error
    return _parse(data, data.read_bytes())


def _chosen(name: str, files: Sequence[str], where: Path) -> list[str]:
    """The file of this name, or all its parts. DataError when there is none, or more than one."""
    pattern = re.compile(rf"(?:.*/)?{re.escape(name)}(-\d+-of-\d+)?({'|'.join(map(re.escape, SUFFIXES))})")
    found = [(file, match) for file in files if (match := pattern.fullmatch(file))]
    if not found:
        raise DataError(f"{where}: has no file {' or '.join(name + suffix for suffix in SUFFIXES)}")
    whole = [file for file, match in found if not match.group(1)]
    if len(whole) > 1 or (whole and len(found) > 1):
        raise DataError(f"{where}: several files could be {name}: {', '.join(file for file, _ in found[:4])}")
    return whole or sorted(file for file, _ in found)


def _parse(path: Path, content: bytes) -> list[Record]:
    """Records of a .jsonl, .json (one list) or .parquet file."""
    if path.suffix == ".parquet":
        return _parquet(path, content)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: {path.suffix or 'a file without suffix'} is not read; allowed: {', '.join(SUFFIXES)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix == ".json":
        whole = _json(path, 1, text)
        return whole if isinstance(whole, list) else [whole]
    return [_json(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON: {' '.join(str(error).split())}") from error


def _parquet(path: Path, content: bytes) -> list[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: needs the package pyarrow: pip install 'fusiontree[data]'") from None
    try:
        rows: list[Record] = parquet.read_table(io.BytesIO(content)).to_pylist()
        return rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file: {' '.join(str(error).split())[:200]}") from error
