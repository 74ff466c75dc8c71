"""How the tokens of one forward pass lie: padding, documents, and what came before.

Every row is brought into one form: padding first, then real tokens (`normal_order` sorts rows that are not). With the
rows' cached tokens placed right before the first real one, a row's whole timeline stays padding, then tokens, so states
and windows are always the last columns. Shapes: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Progress:
    """Where the rows of a cache stand after the tokens seen so far."""

    seen: int = 0  # slots, padding included
    age: Tensor | None = None  # (B,) tokens so far in the current document
    position: Tensor | None = None  # (B,) position id the next token would have
    seq_idx: Tensor | None = None  # (B,) the current document's index, where the caller names documents
    dense: bool = True  # every slot is a token of the current document

    def select(self, rows: Tensor) -> Progress:
        """The same for the rows listed (beam search, repetition)."""
        age, position, seq_idx = (
            None if t is None else t.index_select(0, rows) for t in (self.age, self.position, self.seq_idx)
        )
        return Progress(self.seen, age, position, seq_idx, self.dense)


@dataclass
class Segments:
    """Documents and padding of one forward pass."""

    valid: Tensor | None = None  # (B, L) bool, None: no padding
    pads: Tensor | None = None  # (B,) padding tokens at the row's begin, None: none
    starts: Tensor | None = None  # (B, L) bool: a document begins here and what lies before must not be seen
    reach: Tensor | None = None  # (B, L) keys back that a token sees, itself included; None: all
    masks: dict[tuple, Any] = field(default_factory=dict)  # attention masks, shared by layers with the same window


@dataclass
class Rows:
    """What the caller says of the new tokens; each None where it says nothing."""

    shape: tuple[int, int]  # B, L
    device: torch.device
    valid: Tensor | None = None  # (B, L) bool, False at padding
    position_ids: Tensor | None = None  # (B, L), restarting at 0 at each document
    seq_idx: Tensor | None = None  # (B, L), which document

    def map(self, change: Callable[[Tensor], Tensor], length: int) -> Rows:
        """The same with every description changed alike."""
        valid, position_ids, seq_idx = (
            None if t is None else change(t) for t in (self.valid, self.position_ids, self.seq_idx)
        )
        return Rows((self.shape[0], length), self.device, valid, position_ids, seq_idx)


def normal_order(valid: Tensor) -> Tensor | None:
    """Indices (B, L) that put each row's padding first and keep the rest in order; None when it already is so."""
    if bool((valid[:, 1:] >= valid[:, :-1]).all()):
        return None
    return torch.argsort(valid.int(), dim=1, stable=True)


def lay_out(rows: Rows, past: Progress | None) -> tuple[Tensor, Segments, Progress]:
    """Position ids (B, L), segments, and the progress after these tokens. `rows` are in normal order."""
    (batch, length), device = rows.shape, rows.device
    valid, position_ids, seq_idx = rows.valid, rows.position_ids, rows.seq_idx
    past = past or Progress()
    cold = past.age is None
    zero = torch.zeros(batch, dtype=torch.long, device=device)
    age = zero if past.age is None else past.age
    pads = None if valid is None else length - valid.sum(1)
    slot = torch.arange(length, device=device)
    # The index among the real tokens, negative at padding.
    order = slot[None] if pads is None else slot[None] - pads[:, None]
    starts = _document_starts(order, position_ids, seq_idx, past)

    index = age[:, None] + order
    if starts is not None:
        begin = torch.where(starts, slot, -1).cummax(dim=1).values
        index = torch.where(begin >= 0, slot - begin, index)
    if position_ids is None:
        position = zero if past.position is None else past.position
        ids = index + (position - age)[:, None]
        if starts is not None:
            ids = torch.where(begin >= 0, index, ids)
        ids = ids.clamp_min(0).expand(batch, length)
    else:
        ids = position_ids.masked_fill(order < 0, 0) if pads is not None else position_ids

    dense = past.dense and pads is None and starts is None
    reach = None if dense else (index + 1).clamp_min(1).expand(batch, length)
    empty = None if pads is None else pads == length  # rows without a new token stay as they are
    after = Progress(
        past.seen + length,
        _update(index[:, -1].expand(batch) + 1, age, empty),
        _update(ids[:, -1] + 1, zero if past.position is None else past.position, empty),
        past.seq_idx if seq_idx is None else _update(seq_idx[:, -1], seq_idx[:, -1] if cold else past.seq_idx, empty),
        dense,
    )
    return ids, Segments(valid, pads, starts, reach), after


def _update(new: Tensor, old: Tensor | None, keep_old: Tensor | None) -> Tensor:
    return new if keep_old is None or old is None else torch.where(keep_old, old, new)


def _document_starts(
    order: Tensor, position_ids: Tensor | None, seq_idx: Tensor | None, past: Progress
) -> Tensor | None:
    """(B, L) bool where a document begins that is not simply the first of an empty timeline; None if nowhere."""
    if position_ids is None and seq_idx is None:
        return None
    starts = torch.zeros_like(order, dtype=torch.bool)
    if position_ids is not None:
        starts = starts | (position_ids == 0)
    if seq_idx is not None:
        before = seq_idx[:, :1] if past.seq_idx is None else past.seq_idx[:, None]
        previous = torch.cat([before, seq_idx[:, :-1]], dim=1)
        previous = torch.where(order == 0, before.expand_as(seq_idx), previous)
        starts = starts | (seq_idx != previous)
    starts = starts & (order >= 0)
    if past.age is None:
        starts = starts & (order > 0)
    return starts if bool(starts.any()) else None
