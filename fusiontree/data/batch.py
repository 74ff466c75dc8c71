"""Rows of tokens into the tensors a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch

from fusiontree.data.store import Tokens

IGNORED = -100
WIDTH_STEP = 8
FILLER = -1


class _Always(TypedDict):
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: list[int]


class Batch(_Always, total=False):
    """Tensors (B, L) int64; see `collate`."""

    attention_mask: torch.Tensor


def collate(rows: Sequence[Sequence[Tokens]], sample_ids: list[int], length: int, pad: int, packing: bool) -> Batch:
    """Batch of rows, each a list of documents' tokens.

    labels: the tokens themselves (the model shifts), -100 at the first token of each document and at padding.
    position_ids: restart at 0 at each document. Packed rows are `length` wide; the unfilled end of a source's last row
    is padding that counts as a document of its own, so no mask is needed. Other rows are as wide as the longest (a
    multiple of 8, at most `length`), and attention_mask is 1 at tokens, 0 at padding.
    """
    longest = max(sum(len(tokens) for tokens in row) for row in rows)
    width = length if packing else min(length, -(-longest // WIDTH_STEP) * WIDTH_STEP)
    shape = (len(rows), width)
    ids, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        begin = 0
        for tokens in row:
            end = begin + len(tokens)
            ids[index, begin:end] = tokens
            labels[index, begin + 1 : end] = tokens[1:]
            positions[index, begin:end] = np.arange(len(tokens))
            begin = end
        positions[index, begin:] = np.arange(width - begin)
        mask[index, :begin] = 1
    batch: Batch = {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "sample_ids": sample_ids,
    }
    if not packing:
        batch["attention_mask"] = torch.from_numpy(mask)
    return batch
