"""Where a tensor of ours stands in another model, and how it lies there: each form can be read and written back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Place(Protocol):
    """One tensor of ours, in terms of theirs."""

    def read(self, theirs: Tensors) -> Tensor:
        """Ours from theirs."""

    def write(self, ours: Tensor) -> Tensors:
        """Theirs from ours."""


@dataclass(frozen=True)
class Same:
    """As it is."""

    name: str

    def read(self, theirs: Tensors) -> Tensor:
        return theirs[self.name]

    def write(self, ours: Tensor) -> Tensors:
        return {self.name: ours}


@dataclass(frozen=True)
class Turned:
    """(in, out) there, (out, in) here."""

    name: str

    def read(self, theirs: Tensors) -> Tensor:
        return theirs[self.name].t()

    def write(self, ours: Tensor) -> Tensors:
        return {self.name: ours.t()}


@dataclass(frozen=True)
class Exact:
    """Kept in fp32 here, whatever their dtype."""

    name: str

    def read(self, theirs: Tensors) -> Tensor:
        return theirs[self.name].float()

    def write(self, ours: Tensor) -> Tensors:
        return {self.name: ours}


@dataclass(frozen=True)
class Several:
    """Tensors there of the given lengths, one under another here."""

    names: Sequence[str]
    lengths: Sequence[int]

    def read(self, theirs: Tensors) -> Tensor:
        return torch.cat([theirs[name] for name in self.names])

    def write(self, ours: Tensor) -> Tensors:
        return dict(zip(self.names, ours.split(list(self.lengths)), strict=True))


@dataclass(frozen=True)
class Interleaved:
    """Queries, keys and values: by key head there (its queries, the key, the value), all of a kind together here."""

    name: str
    heads: int
    kv_heads: int

    def read(self, theirs: Tensors) -> Tensor:
        grouped = theirs[self.name].unflatten(0, (self.kv_heads, self.heads // self.kv_heads + 2, -1))
        queries, key, value = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
        return torch.cat([queries.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)])

    def write(self, ours: Tensor) -> Tensors:
        shares = self.heads // self.kv_heads
        parts = ours.unflatten(0, (self.heads + 2 * self.kv_heads, -1)).split(
            [self.heads, self.kv_heads, self.kv_heads]
        )
        queries, key, value = parts[0].unflatten(0, (self.kv_heads, shares)), parts[1][:, None], parts[2][:, None]
        return {self.name: torch.cat([queries, key, value], dim=1).flatten(0, 2)}


@dataclass(frozen=True)
class Kernel:
    """A depthwise convolution's (C, 1, K) there, (C, K) here."""

    name: str

    def read(self, theirs: Tensors) -> Tensor:
        return theirs[self.name].squeeze(1)

    def write(self, ours: Tensor) -> Tensors:
        return {self.name: ours.unsqueeze(1)}


@dataclass(frozen=True)
class OrZero:
    """A bias that may be missing there, which is one of zero."""

    name: str
    length: int

    def read(self, theirs: Tensors) -> Tensor:
        found = theirs.get(self.name)
        like = next(iter(theirs.values()))
        return like.new_zeros(self.length) if found is None else found

    def write(self, ours: Tensor) -> Tensors:
        return {self.name: ours}


def norm(ours: str, theirs: str, kind: str) -> dict[str, Place]:
    """A norm's weight, and a LayerNorm's bias."""
    return affine(ours, theirs, kind == "layer")


def affine(ours: str, theirs: str, bias: bool, turned: bool = False) -> dict[str, Place]:
    """A weight, and a bias where there is one."""
    places: dict[str, Place] = {
        f"{ours}.weight": Turned(f"{theirs}.weight") if turned else Same(f"{theirs}.weight"),
    }
    return places | ({f"{ours}.bias": Same(f"{theirs}.bias")} if bias else {})
