"""Columns of the contract: padding anywhere changes nothing."""

import torch
from torch import Tensor

from fusiontree.models import HybridCache, HybridLanguageModel
from tests.models.kinds import VOCAB, assert_same, assert_same_gradients, gradients, tokens

Model = HybridLanguageModel
LENGTHS = (63, 20, 1)  # of the rows; the batch is 63 wide


def texts() -> list[Tensor]:
    return [tokens(1, length, seed=i)[0] for i, length in enumerate(LENGTHS)]


def placed(rows: list[Tensor], mask: Tensor) -> Tensor:
    """The rows' tokens where the mask is 1, junk elsewhere."""
    ids = tokens(*mask.shape, seed=77)
    for row, text in enumerate(rows):
        ids[row, mask[row] == 1] = text
    return ids


def left_mask() -> Tensor:
    width = max(LENGTHS)
    return torch.stack([(torch.arange(width) >= width - n).long() for n in LENGTHS])


def right_mask() -> Tensor:
    return left_mask().flip(1)


def hole_mask() -> Tensor:
    """80 wide: padding at both ends and scattered between."""
    mask = torch.zeros(len(LENGTHS), 80, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, torch.randperm(80, generator=torch.Generator().manual_seed(row))[:length]] = 1
    return mask


def _alone(model: Model, rows: list[Tensor]) -> list[Tensor]:
    return [model(text[None], use_cache=False).logits[0] for text in rows]


def _compare(logits: Tensor, mask: Tensor, want: list[Tensor]) -> None:
    assert logits.isfinite().all(), "padding slots must stay finite"
    for row, expected in enumerate(want):
        assert_same(logits[row, mask[row] == 1], expected)


@torch.no_grad()
def padded_is_alone(model: Model) -> None:
    rows = texts()
    want = _alone(model, rows)
    for mask in (left_mask(), right_mask(), hole_mask()):
        ids = placed(rows, mask)
        _compare(model(ids, attention_mask=mask).logits, mask, want)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as `generate` makes them
        _compare(model(ids, attention_mask=mask, position_ids=positions).logits, mask, want)
    mask = left_mask()
    for form in (mask.bool(), mask.float()):
        _compare(model(placed(rows, mask), attention_mask=form).logits, mask, want)


@torch.no_grad()
def padded_and_cached_is_alone(model: Model) -> None:
    """Chunks of a padded batch, some rows all padding in some of them, then one token after another."""
    rows = texts()
    more = tokens(3, 7, seed=50)
    want = _alone(model, [torch.cat([text, extra]) for text, extra in zip(rows, more, strict=True)])
    for mask in (left_mask(), right_mask(), hole_mask()):
        full = torch.cat([mask, torch.ones(3, 7, dtype=torch.long)], dim=1)
        ids = torch.cat([placed(rows, mask), more], dim=1)
        width = mask.shape[1]
        chunkings = [[width] + [1] * 7, [11] * 5 + [width - 55] + [4, 3]]
        for sizes in chunkings if width == 63 else [*chunkings, [1] * (width + 7)]:
            cache, parts, at = HybridCache(model.config), [], 0
            for size in sizes:
                chunk = ids[:, at : at + size]
                at += size
                parts.append(model(chunk, attention_mask=full[:, :at], past_key_values=cache).logits)
            _compare(torch.cat(parts, dim=1), full, want)


@torch.no_grad()
def padded_rows_generate_as_alone(model: Model) -> None:
    rows, mask = texts(), left_mask()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got = model.generate(placed(rows, mask), attention_mask=mask, **settings)[:, max(LENGTHS) :]
    for row, text in enumerate(rows):
        ids = text[None]
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert got[row].tolist() == ids[0, len(text) :].tolist()


def padded_gradients_are_those_alone(model: Model) -> None:
    rows = texts()
    weights = [torch.randn(len(text), VOCAB) for text in rows]
    alone = sum((model(text[None], use_cache=False).logits[0] * w).sum() for text, w in zip(rows, weights, strict=True))
    want = gradients(model, alone)
    for mask in (left_mask(), hole_mask()):
        logits = model(placed(rows, mask), attention_mask=mask, use_cache=False).logits
        loss = sum((logits[row, mask[row] == 1] * w).sum() for row, w in enumerate(weights))
        assert_same_gradients(gradients(model, loss), want)


COLUMNS = [
    padded_is_alone,
    padded_and_cached_is_alone,
    padded_rows_generate_as_alone,
    padded_gradients_are_those_alone,
]
