"""Named tensors as safetensors files: one, or when they are large several, so that memory holds one file at a time.

The names of the files and of the index are Hugging Face's: `model.safetensors`, or `model-00001-of-00003.safetensors` …
and `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusiontree.errors import CheckpointError

FILE_BYTES = 4_000_000_000
_TYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


def write_tensors(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> None:
    """Write `stem.safetensors`, or several files of at most about `file_bytes` and their index; raises OSError."""
    writer = _Writer(folder, stem, file_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.finish()


class _Writer:
    def __init__(self, folder: Path, stem: str, file_bytes: int) -> None:
        self.folder, self.stem, self.file_bytes = folder, stem, file_bytes
        self.held: dict[str, Tensor] = {}
        self.bytes = self.total = 0
        self.files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > self.file_bytes:
            self._flush()
        self.held[name] = tensor.detach().cpu().contiguous()
        self.bytes += size
        self.total += size

    def _flush(self) -> None:
        path = self.folder / f"{self.stem}-{len(self.files) + 1:05d}.safetensors"
        save_file(self.held, path, metadata={"format": "pt"})  # which from_pretrained asks for
        self.files.append((path, list(self.held)))
        self.held, self.bytes = {}, 0

    def finish(self) -> None:
        if self.held or not self.files:
            self._flush()
        if len(self.files) == 1:
            self.files[0][0].rename(self.folder / f"{self.stem}.safetensors")
            return
        places = {}
        for number, (path, names) in enumerate(self.files, 1):
            final = path.with_name(f"{self.stem}-{number:05d}-of-{len(self.files):05d}.safetensors")
            path.rename(final)
            places.update(dict.fromkeys(names, final.name))
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")


class TensorFiles:
    """Reads what `write_tensors` wrote; raises CheckpointError when a file is not safetensors."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        index = folder / f"{stem}.safetensors.index.json"
        files = [f"{stem}.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        opened = [_open(folder / file) for file in files]
        self._places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and type of each tensor, by name."""
        slices = {name: file.get_slice(name) for name, file in self._places.items()}
        return {name: (part.get_shape(), _TYPES[part.get_dtype()]) for name, part in slices.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the host; raises CheckpointError when there is none of this name."""
        if name not in self._places:
            raise CheckpointError(f"{self.folder}: no file of {self.stem} holds {name}")
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name; raises CheckpointError when it is not safetensors."""
    file = _open(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
