"""Keys and values of one group of heads, and how what is cached joins what is new.

Shapes: B batch, K key/value heads, S keys, L tokens, P head size, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROOM = 256  # spare slots of a buffer, so that decoding appends in place


def insert_past(past: Tensor, new: Tensor, pads: Tensor | None) -> Tensor:
    """Join along dimension 1 with each row's past right before its first real token: [padding | past | tokens]."""
    joined = torch.cat([past.to(new.dtype), new], dim=1)
    if pads is None:
        return joined
    size = past.shape[1]
    slot = torch.arange(joined.shape[1], device=new.device)[None]
    pads = pads[:, None]
    source = torch.where(slot < pads, slot + size, torch.where(slot < pads + size, slot - pads, slot))
    return joined.gather(1, source.view(*source.shape, *[1] * (joined.ndim - 2)).expand_as(joined))


class KVBuffer:
    """Keys and values in order of time. With a window it shows the last W - 1 before the new ones; without, all."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.store: Tensor | None = None  # (2, B, K, capacity, P)
        self.begin = 0
        self.end = 0
        self.recorded = 0  # last tokens that may yet be taken back: the window before them is kept too

    def extend(self, k: Tensor, v: Tensor, pads: Tensor | None, keep_all: bool) -> tuple[Tensor, Tensor]:
        """Add k and v (B, K, L, P); returns what the new queries may need, (B, K, S, P), the new ones last."""
        if k.shape[2] == 1 and pads is None and not torch.is_grad_enabled() and self._append(k, v):
            self.recorded = self.recorded + 1 if keep_all else 0
            begin = self.begin if self.window is None else max(self.begin, self.end - self.window)
            shown = self.store[:, :, :, begin : self.end]  # type: ignore[index]
            return shown[0], shown[1]
        joined = torch.stack([k, v])
        past = self._past()
        if past is not None:
            flat = (t.flatten(0, 1).transpose(1, 2).unflatten(0, (2, -1)) for t in (past, joined))
            rows = [insert_past(p, n, pads) for p, n in zip(*flat, strict=True)]
            joined = torch.stack(rows).transpose(2, 3)
        self.recorded = self.recorded + k.shape[2] if keep_all else 0
        keep = joined.shape[3]
        if self.window is not None:
            keep = min(keep, self.window - 1 + self.recorded)
        self._hold(joined[:, :, :, joined.shape[3] - keep :])
        return joined[0], joined[1]

    def tensors(self) -> Tensor | None:
        """All that is held, (2, B, K, S, P)."""
        return None if self.store is None else self.store[:, :, :, self.begin : self.end]

    def replace(self, tensors: Tensor | None) -> None:
        if tensors is None:
            self.store, self.begin, self.end = None, 0, 0
        else:
            self._hold(tensors)

    def drop_last(self, count: int) -> None:
        self.end -= count

    def fork(self) -> KVBuffer:
        twin = KVBuffer(self.window)
        twin.replace(self.tensors())
        twin.recorded = self.recorded
        return twin

    def _past(self) -> Tensor | None:
        held = self.tensors()
        if held is None or self.window is None:
            return held
        keep = min(held.shape[3], self.window - 1 + self.recorded)
        return held[:, :, :, held.shape[3] - keep :]

    def _append(self, k: Tensor, v: Tensor) -> bool:
        if self.store is None or self.store.dtype != k.dtype:
            return False
        if self.end == self.store.shape[3]:
            self._hold(self._past())  # type: ignore[arg-type]
        self.store[0, :, :, self.end] = k[:, :, 0]
        self.store[1, :, :, self.end] = v[:, :, 0]
        self.end += 1
        return True

    def _hold(self, tensors: Tensor) -> None:
        """Own a copy with room to grow; under grad the tensors themselves, so that gradients flow through the cache."""
        self.begin, self.end = 0, tensors.shape[3]
        if tensors.requires_grad:
            self.store = tensors
            return
        room = max(_ROOM, self.end // 4) if self.window is None else max(_ROOM, self.window)
        with torch.inference_mode(False):  # written in place later, perhaps after inference mode has ended
            self.store = tensors.new_empty(*tensors.shape[:3], self.end + room, tensors.shape[4])
        self.store[:, :, :, : self.end] = tensors
