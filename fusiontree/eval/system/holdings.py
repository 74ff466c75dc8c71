"""Bytes that a model and its generation cache hold, read off their tensors."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor, nn

# Parts of a cache, and the words in the names of attributes that hold them: ours, and those of transformers.
SIGNS = {
    "conv": {"conv"},
    "ssm": {"ssm", "recurrent"},
    "kv": {"key", "keys", "value", "values", "kv", "store"},
}
REST = "other"  # positions and the like
CACHE_PARTS = ("kv", "ssm", "conv", REST)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers in memory, tied ones once."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a generation cache keeps alive: the storages of all its tensors, shared ones once."""
    return sum(cache_parts(cache).values())


def cache_parts(cache: Any) -> dict[str, int]:
    """`cache_bytes` by part: kv, ssm, conv, other. Whatever the cache's class: parts are known by attribute names."""
    storages: dict[int, tuple[str, int]] = {}
    _collect(cache, REST, storages, set())
    found = dict.fromkeys(CACHE_PARTS, 0)
    for part, size in storages.values():
        found[part] += size
    return found


def _collect(item: Any, part: str, storages: dict[int, tuple[str, int]], seen: set[int]) -> None:
    if isinstance(item, Tensor):
        storage = item.untyped_storage()
        storages.setdefault(storage.data_ptr(), (part, storage.nbytes()))
        return
    if id(item) in seen or isinstance(item, (str, bytes, int, float, type, nn.Module)):
        return
    seen.add(id(item))
    if isinstance(item, (list, tuple)):
        for child in item:
            _collect(child, part, storages, seen)
        return
    for name, child in (item if isinstance(item, dict) else getattr(item, "__dict__", {})).items():
        _collect(child, _part_named(str(name), part), storages, seen)


def _part_named(name: str, around: str) -> str:
    """The part that an attribute of this name holds, else the part it lies in."""
    words = set(name.split("_"))
    return next((part for part, signs in SIGNS.items() if words & signs), around)
