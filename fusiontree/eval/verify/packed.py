"""Lines about what may see what: the arrow of time, documents in one row, and whether context matters at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.eval.verify.error import ModelFailedError, NotOfferedError, relative_error
from fusiontree.eval.verify.specimen import Specimen, spans


def causal(specimen: Specimen) -> float:
    """Other tokens from some place on: what lies before stays as it was."""
    ids, length = specimen.ids[:2], specimen.length
    before, worst = specimen.whole(ids), 0.0
    for t in sorted({1, length // 4, length // 2, length - 1}):
        changed = torch.cat([ids[:, :t], specimen.other(ids[:, t:])], dim=1)
        worst = max(worst, relative_error(specimen.whole(changed)[:, :t], before[:, :t]))
    return worst


def context(specimen: Specimen) -> float:
    """What another first half does to the logits of the second: where it is next to nothing, no fault would show."""
    ids, half = specimen.ids[:2], specimen.length // 2
    changed = torch.cat([specimen.other(ids[:, :half]), ids[:, half:]], dim=1)
    return relative_error(specimen.whole(changed)[:, half:], specimen.whole(ids)[:, half:])


def packed_by_position(specimen: Specimen) -> float:
    """Documents in one row, told apart by position ids that begin again."""
    specimen.needs("position_ids")
    ids, sizes = specimen.ids[:2], _documents(specimen.length)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes]).to(specimen.device)
    return relative_error(specimen.whole(ids, position_ids=positions), _separate(specimen, ids, sizes))


def packed_by_name(specimen: Specimen) -> float:
    """Documents in one row, told apart by `seq_idx`."""
    ids, sizes = specimen.ids[:2], _documents(specimen.length)
    names = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in sizes]
    try:
        got = specimen.whole(ids, seq_idx=torch.stack(names).to(specimen.device))
    except ModelFailedError:
        specimen.needs("seq_idx")
        raise
    if "seq_idx" not in specimen.takes and torch.equal(got, specimen.whole(ids)):
        raise NotOfferedError("seq_idx is swallowed without effect")
    return relative_error(got, _separate(specimen, ids, sizes))


def _documents(length: int) -> list[list[int]]:
    """Lengths of the documents of two rows."""
    first, second = max(1, length // 3), max(1, length // 5)
    return [[first, 1, length - first - 1], [3, second, length - second - 3]]


def _separate(specimen: Specimen, ids: Tensor, sizes: list[list[int]]) -> Tensor:
    rows = []
    for row, lengths in zip(ids, sizes, strict=True):
        rows.append(torch.cat(specimen.alone([row[begin:end] for begin, end in spans(lengths)])))
    return torch.stack(rows)
