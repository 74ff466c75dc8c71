"""Which stretches of a token store are learnt from and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusiontree.data.store import TokenStore
from fusiontree.errors import DataError

Split = Literal["train", "validation"]
LARGEST_SHARE = 0.2


@dataclass(frozen=True)
class Pieces:
    """Stretches of a store's tokens, each within one document: int64 arrays of equal length."""

    begins: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def all_pieces(store: TokenStore) -> Pieces:
    """Every document, whole."""
    offsets = np.asarray(store.offsets, dtype=np.int64)
    return Pieces(offsets[:-1], np.diff(offsets))


def hold_out(store: TokenStore, fraction: float, split: Split, name: str) -> Pieces:
    """One side of the division of a source by `fraction`.

    Whole documents are held out, by the hash of their text, at least one. Where that would take more than a fifth of
    the tokens (a handful of long documents, one book), the last part of each document is held out instead.
    Raises DataError when nothing remains on the asked side.
    """
    pieces = all_pieces(store)
    if fraction == 0:
        chosen = np.zeros(len(pieces.begins), dtype=bool)
    else:
        hashes = np.asarray(store.hashes)
        chosen = hashes < np.uint64(int(fraction * 2**64))
        if not chosen.any():
            chosen = hashes == hashes.min()
        too_much = max(LARGEST_SHARE, 2 * fraction) * pieces.lengths.sum()
        if chosen.all() or pieces.lengths[chosen].sum() > too_much:
            return _non_empty(_ends(pieces, fraction, split), split, name)
    kept = chosen if split == "validation" else ~chosen
    return _non_empty(Pieces(pieces.begins[kept], pieces.lengths[kept]), split, name)


def _ends(pieces: Pieces, fraction: float, split: Split) -> Pieces:
    """The last `fraction` of each document, at least two tokens where it has four; or what is before."""
    held = np.maximum(np.ceil(pieces.lengths * fraction).astype(np.int64), 2)
    held = np.where(pieces.lengths >= 4, np.minimum(held, pieces.lengths // 2), 0)
    kept = pieces.lengths - held
    begins, lengths = (pieces.begins + kept, held) if split == "validation" else (pieces.begins, kept)
    return Pieces(begins[lengths > 0], lengths[lengths > 0])


def _non_empty(pieces: Pieces, split: Split, name: str) -> Pieces:
    if not len(pieces.begins):
        raise DataError(
            f"{name}: nothing left for {split}; give data.validation sources of its own or change validation_fraction"
        )
    return pieces
