"""The state pool: texts of different lengths in one cache, which one model call moves on by a token each.

Rows stand in the cache as a left-padded batch does: in order of time, the newest key last, and `reach` hides what is
not a row's own. So every mixer works on the pool unchanged. A text joins as the last row, and where one leaves, the
last takes its place: a step reads the rows in use and nothing is gathered.

Shapes: B rows, K key/value heads, S keys, P head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusiontree.models.cache import HybridCache
from fusiontree.models.config import HybridConfig
from fusiontree.models.kv_buffer import KVBuffer
from fusiontree.models.segments import Progress

Parts: TypeAlias = Sequence[Mapping[str, Tensor | None]]
"""The state of one text, layer by layer, as `HybridCacheLayer.parts` names it; batch size 1."""

_STATES = ("conv_state", "ssm_state")
_ROWS = (*_STATES, "age", "position", "seq_idx")
_ROOM = 256  # spare columns, so that decoding appends in place


class SlotKV(KVBuffer):
    """Keys and values of all rows. `store` shows the rows in use of a larger `_all`, so that a join rarely copies."""

    def __init__(self, window: int | None) -> None:
        super().__init__(window)
        self._all: Tensor | None = None  # (2, rows, K, columns, P)

    def join(self, rows: Sequence[Tensor]) -> None:
        """Add rows, each (2, 1, K, S, P) with an S of its own, the newest key last."""
        if self.window is not None:
            rows = [row[:, :, :, -(self.window - 1) :] if self.window > 1 else row[:, :, :, :0] for row in rows]
        before = 0 if self.store is None else self.store.shape[1]
        held = self.end - self.begin
        needed = max(held, *(row.shape[3] for row in rows))
        count = before + len(rows)
        if self._all is None or count > self._all.shape[1] or needed > self.end:
            self._grow(rows[0], before, 1 << (count - 1).bit_length(), needed)
        assert self._all is not None
        self._all[:, :before, :, self.end - needed : self.end - held] = 0
        self.begin = self.end - needed
        for place, row in enumerate(rows, start=before):
            own = self._all[:, place, :, self.begin : self.end]
            size = row.shape[3]
            # What is hidden must still be finite: 0 times NaN is NaN.
            own[:, :, : needed - size] = 0
            own[:, :, needed - size :] = row[:, 0]
        self.store = self._all[:, :count]

    def leave(self, row: int) -> None:
        """Take a row out; the last one moves to its place."""
        assert self.store is not None
        last = self.store.shape[1] - 1
        if row != last:
            shown = self.store[:, :, :, self.begin : self.end]
            shown[:, row] = shown[:, last]
        self.store = self.store[:, :last]

    def show_last(self, columns: int) -> None:
        """Read no more than this many columns from now on."""
        self.begin = max(self.begin, self.end - columns)

    def _grow(self, like: Tensor, before: int, rows: int, needed: int) -> None:
        held = self.tensors()
        kept = 0 if held is None else held.shape[3]
        grown = like.new_empty(2, rows, like.shape[2], needed + self._spare(needed), like.shape[4])
        if held is not None:
            grown[:, :before, :, needed - kept : needed] = held
        self._all, self.begin, self.end = grown, needed - kept, needed

    def _hold(self, tensors: Tensor) -> None:
        """Called when the columns are used up: go on in fresh ones."""
        assert self._all is not None
        count, columns = tensors.shape[1], tensors.shape[3]
        fresh = tensors.new_empty(
            2, self._all.shape[1], tensors.shape[2], columns + self._spare(columns), self._all.shape[4]
        )
        fresh[:, :count, :, :columns] = tensors
        self._all, self.store, self.begin, self.end = fresh, fresh[:, :count], 0, columns

    def _spare(self, columns: int) -> int:
        return max(_ROOM, columns // 4) if self.window is None else max(_ROOM, self.window)


class SlotPool:
    """The texts that decode together. Row numbers shift when one leaves: the last row takes its place."""

    def __init__(self, config: HybridConfig) -> None:
        self.config = config
        self.lengths: list[int] = []
        """Tokens that each row has seen."""
        self._cache = HybridCache(config)
        self._clear()

    def _clear(self) -> None:
        for layer in self._cache.layers:
            layer.reset()
            layer.local, layer.everywhere = SlotKV(layer.local.window), SlotKV(None)

    def __len__(self) -> int:
        return len(self.lengths)

    def join(self, texts: Sequence[Parts]) -> None:
        """Add texts as the last rows; their tensors are copied."""
        for i, layer in enumerate(self._cache.layers):
            parts = [text[i] for text in texts]
            for name in _STATES:
                if parts[0][name] is not None:
                    setattr(layer, name, _joined(getattr(layer, name), [part[name] for part in parts]))
            for name, buffer in (("local", layer.local), ("global", layer.everywhere)):
                if parts[0][name] is not None:
                    buffer.join([part[name] for part in parts])
        before = self._cache.progress
        age, position = (
            _joined(old, [text[0][name] for text in texts])
            for name, old in (("age", before.age), ("position", before.position))
        )
        self.lengths += [int(text[0]["age"]) for text in texts]  # type: ignore[arg-type]
        # One row alone is what it would be without a pool: nothing is hidden, nothing needs a mask.
        self._cache.layers[0].progress = Progress(0, age, position, None, dense=len(self) == 1)

    def leave(self, row: int) -> None:
        """Take a text out; the last row takes its place."""
        last = len(self) - 1
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self._clear()
            return
        for layer in self._cache.layers:
            for name in _STATES:
                state = getattr(layer, name)
                if state is not None:
                    state[row] = state[last]
                    setattr(layer, name, state[:last])
            for buffer in (layer.local, layer.everywhere):
                if buffer.store is not None:
                    buffer.leave(row)
        progress = self._cache.progress
        kept = torch.tensor([last if i == row else i for i in range(last)], device=progress.age.device)  # type: ignore[union-attr]
        self._cache.layers[0].progress = progress.select(kept)

    def row(self, row: int) -> Parts:
        """The state of one text, as views."""
        return text_parts(self._cache, row, self.lengths[row])

    def step(self, model: Any, tokens: Sequence[int], gates: bool = False) -> Any:
        """One model call: feed a token per row; the output's logits are (B, 1, V)."""
        longest = max(self.lengths)
        for layer in self._cache.layers:
            layer.everywhere.show_last(longest)
        self._cache.progress.seen = longest
        ids = torch.tensor(tokens, device=model.device)[:, None]
        out = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, output_gates=gates)
        self.lengths = [length + 1 for length in self.lengths]
        return out

    def state_bytes(self) -> int:
        """Bytes held, spare room included."""
        total = 0
        for layer in self._cache.layers:
            for state in (layer.conv_state, layer.ssm_state, layer.local._all, layer.everywhere._all):
                total += 0 if state is None else state.numel() * state.element_size()
        return total


def _joined(old: Tensor | None, new: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t for t in (old, *new) if t is not None])


def text_parts(cache: HybridCache, row: int, tokens: int) -> Parts:
    """The state of one row of a cache, whose text has `tokens` tokens, as views."""
    parts: list[dict[str, Tensor | None]] = []
    for layer in cache.layers:
        part = {name: None if t is None else t[row : row + 1] for name, t in layer.parts().items() if name in _ROWS}
        for name, buffer in (("local", layer.local), ("global", layer.everywhere)):
            held = buffer.tensors()
            seen = tokens if buffer.window is None else min(tokens, buffer.window - 1)
            part[name] = None if held is None else held[:, row : row + 1, :, max(0, held.shape[3] - seen) :]
        parts.append(part)
    return parts
