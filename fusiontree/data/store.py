"""Token store: a folder with the tokens of many documents as one memory map, their bounds, hashes and origins.

tokens.bin     tokens of all documents one after the other, each ended by eos; uint16 or uint32, little endian
offsets.npy    int64 (documents + 1): where each document begins in tokens.bin
hashes.npy     uint64 (documents): hash of each document's text, which decides what is held out
origins.npy    int64 (documents, 4): index of the file, first line (from 1), byte offset, size in bytes
meta.json      format, tokenizer hash, fingerprint, files, counts of what was left out; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fusiontree.data.records import BadRecords, Document
from fusiontree.errors import DataError

FORMAT, VERSION = "fusiontree-tokens", 1
Tokens = npt.NDArray[np.int64]


class TokenStore:
    """A finished store, read through memory maps. Raises DataError when the folder is not a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)
        try:
            self.offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
            self.hashes = np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False)
            self.origins = np.load(folder / "origins.npy", mmap_mode="r", allow_pickle=False)
            self._tokens = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")
            self.bad_records = BadRecords(**self.meta["bad_records"])
            self.fingerprint = str(self.meta["fingerprint"])
            self._check_sizes()
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(f"{folder}: damaged token folder ({error}); make it again") from error

    def read(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) as int64."""
        return self._tokens[begin:end].astype(np.int64)

    def locate(self, document: int) -> str:
        """`file:line` of a document."""
        file, line = self.origins[document, :2]
        return f"{self.meta['files'][int(file)]}:{int(line)}"

    def _check_sizes(self) -> None:
        documents = int(self.meta["documents"])
        shapes = (self.offsets.shape, self.hashes.shape, self.origins.shape)
        if shapes != ((documents + 1,), (documents,), (documents, 4)):
            raise ValueError(f"arrays of shape {shapes} for {documents} documents")
        if documents < 1 or self.offsets[0] != 0 or np.any(np.diff(self.offsets) < 1):
            raise ValueError("document bounds do not rise")
        if not len(self._tokens) == int(self.offsets[-1]) == int(self.meta["tokens"]):
            raise ValueError(f"{len(self._tokens)} tokens instead of {self.meta['tokens']}")


class StoreWriter:
    """Writes a store beside its target and renames it when whole; leaving the block early removes the draft."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._draft = folder.with_name(folder.name + ".tmp")
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._offsets, self._hashes, self._origins = array("q", [0]), array("Q"), array("q")
        self._files: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._handle: BinaryIO | None = None

    def __enter__(self) -> StoreWriter:
        shutil.rmtree(self._draft, ignore_errors=True)  # left by a killed process; callers hold the target's lock
        try:
            self._draft.mkdir(parents=True)
            self._handle = (self._draft / "tokens.bin").open("wb")
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._handle is not None:
            with suppress(OSError):  # a full disk fails here once more; the draft goes anyway
                self._handle.close()
        shutil.rmtree(self._draft, ignore_errors=True)

    def append(self, document: Document, ids: npt.NDArray[Any]) -> None:
        """Add one document with its tokens (eos included)."""
        text_hash = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        self._append(ids, int.from_bytes(text_hash, "little"))
        file = self._files.setdefault(document.path, len(self._files))
        self._origins.extend((file, document.line, document.offset, document.size))

    def copy(self, store: TokenStore) -> None:
        """Add all documents of a finished store."""
        for number, (begin, end) in enumerate(zip(store.offsets[:-1], store.offsets[1:], strict=True)):
            self._append(store.read(begin, end), int(store.hashes[number]))
            file, *place = store.origins[number].tolist()
            path = store.meta["files"][file]
            self._origins.extend((self._files.setdefault(path, len(self._files)), *place))

    def _append(self, ids: npt.NDArray[Any], text_hash: int) -> None:
        assert self._handle is not None, "used outside its with block"
        data = ids.astype(self._dtype).tobytes()
        try:
            self._handle.write(data)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._digest.update(len(ids).to_bytes(8, "little") + data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._hashes.append(text_hash)

    def finish(self, key: str, tokenizer_hash: str, bad_records: BadRecords) -> None:
        """Write the arrays and meta.json and move the folder to its place."""
        assert self._handle is not None, "used outside its with block"
        self._digest.update(tokenizer_hash.encode())
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "tokenizer_hash": tokenizer_hash,
            "fingerprint": self._digest.hexdigest(),
            "dtype": self._dtype.str,
            "tokens": self._offsets[-1],
            "documents": len(self._hashes),
            "files": list(self._files),
            "bad_records": bad_records.to_json(),
        }
        try:
            _sync(self._handle)
            self._handle.close()
            self._save("offsets", np.frombuffer(self._offsets, dtype=np.int64))
            self._save("hashes", np.frombuffer(self._hashes, dtype=np.uint64))
            self._save("origins", np.frombuffer(self._origins, dtype=np.int64).reshape(-1, 4))
            with (self._draft / "meta.json").open("wb") as handle:
                handle.write(json.dumps(meta, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape"))
                _sync(handle)
            os.replace(self._draft, self._folder)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _save(self, name: str, values: npt.NDArray[Any]) -> None:
        with (self._draft / f"{name}.npy").open("wb") as handle:
            np.save(handle, values, allow_pickle=False)
            _sync(handle)

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(f"{self._folder}: cannot be written: {error.strerror or error}")


def _sync(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8", "surrogateescape"))
    except FileNotFoundError:
        raise DataError(f"{folder}: not a folder made by prepare_static (it has no meta.json)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}/meta.json: cannot be read: {error}") from error
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{folder}/meta.json: not a token folder of version {VERSION}; prepare it again")
    return meta
