"""Lines about the cache: however a text is cut into pieces, and whatever is done with the cache between them.

All but `chunked` and `rolled_back` go on token by token, so that each has a fault of its own to find. Each function
gives the relative error; it raises NotOfferedError where the model does not claim to do this.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fusiontree.eval.verify.error import NotOfferedError, relative_error
from fusiontree.eval.verify.specimen import Specimen, chunkings, fitted
from fusiontree.models.cache import HybridCache


def cached(specimen: Specimen) -> float:
    """Prefill, then token by token; and token by token from the first."""
    ids, length = specimen.ids[:2], specimen.length
    want = specimen.whole(ids)
    ways = [fitted([length // 2] + [1] * length, length), [1] * length]
    return max(relative_error(specimen.feed(ids, sizes)[0], want) for sizes in ways)


def chunked(specimen: Specimen) -> float:
    """Pieces of several tokens on a warm cache."""
    ids = specimen.ids[:2]
    want = specimen.whole(ids)
    return max(relative_error(specimen.feed(ids, sizes)[0], want) for sizes in chunkings(specimen.length))


def positions_left_out(specimen: Specimen) -> float:
    """Prefill and token by token without position ids: the model has to count on from its cache."""
    specimen.needs("position_ids")
    ids, length = specimen.ids[:2], specimen.length
    sizes = fitted([length // 2] + [1] * length, length)
    return relative_error(specimen.feed(ids, sizes, told=False)[0], specimen.whole(ids))


def forked(specimen: Specimen) -> float:
    """Two copies of a cache go on by turns with texts of their own."""
    ids, length = specimen.ids[:2], specimen.length
    start = length // 2
    texts = [ids, torch.cat([ids[:, :start], specimen.other(ids[:, start:])], dim=1)]
    cache = specimen.feed(ids[:, :start], [start])[1]
    caches = [cache, specimen.fork(cache)]
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for t in range(start, length):
        for row, text in enumerate(texts):
            logits, caches[row] = specimen.feed(text[:, t : t + 1], [1], caches[row], seen=t)
            parts[row].append(logits)
    wanted = [specimen.whole(text)[:, start:] for text in texts]
    return max(relative_error(torch.cat(part, dim=1), want) for part, want in zip(parts, wanted, strict=True))


def reordered(specimen: Specimen) -> float:
    """Rows take each other's places, as in beam search."""
    ids, length = specimen.ids[:3], specimen.length
    start, rows = length // 2, torch.tensor([2, 0, 0], device=specimen.device)
    cache = specimen.feed(ids[:, :start], [start])[1]
    if not hasattr(cache, "reorder_cache"):
        raise NotOfferedError("its cache has no reorder_cache")
    cache.reorder_cache(rows)
    got = specimen.feed(ids[rows][:, start:], [1] * (length - start), cache, seen=start)[0]
    return relative_error(got, specimen.whole(ids)[rows, start:])


def rolled_back(specimen: Specimen) -> float:
    """Tokens guessed wrong are taken back, over and over, as assisted decoding does."""
    ids, length = specimen.ids[:2], specimen.length
    want, wrong, at = specimen.whole(ids), specimen.other(specimen.ids[:2]), length // 3
    cache = specimen.feed(ids[:, :at], [at])[1]
    if not getattr(cache, "is_croppable", hasattr(cache, "crop")):
        raise NotOfferedError("its cache says that it cannot be cropped")
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    worst = 0.0
    for right, guessed in [(3, 2), (1, 4), (1, 1), (2, 3)]:
        if at + right + guessed >= length:
            break
        text = torch.cat([ids[:, at : at + right], wrong[:, at + right : at + right + guessed]], dim=1)
        got, cache = specimen.feed(text, [right + guessed], cache, seen=at)
        cache.crop(-guessed)
        worst = max(worst, relative_error(got[:, :right], want[:, at : at + right]))
        at += right
    got = specimen.feed(ids[:, at:], [1] * (length - at), cache, seen=at)[0]
    return max(worst, relative_error(got, want[:, at:]))


def cache_saved(specimen: Specimen) -> float:
    """A cache is written to a file, read back, and goes on."""
    ids, start = specimen.ids[:2], specimen.length // 2
    cache = specimen.feed(ids[:, :start], [start])[1]
    if not isinstance(cache, HybridCache):
        raise NotOfferedError("its cache cannot be saved")
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "state.safetensors")
        again = HybridCache(specimen.model.config).load(Path(folder) / "state.safetensors", specimen.device)
    got = specimen.feed(ids[:, start:], [1] * (specimen.length - start), again, seen=start)[0]
    return relative_error(got, specimen.whole(ids)[:, start:])
