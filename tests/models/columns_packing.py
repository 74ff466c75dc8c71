"""Columns of the contract: documents packed into one row, and the arrow of time."""

import torch
from torch import Tensor

from fusiontree.models import HybridCache, HybridLanguageModel
from tests.models.kinds import VOCAB, assert_same, assert_same_gradients, gradients, tokens

Model = HybridLanguageModel
DOCUMENTS = ((40, 1, 22), (3, 13, 47))  # lengths in each row, 63 in all
LENGTH = 63


def restarting() -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def numbered() -> Tensor:
    return torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in DOCUMENTS])


def _separate(model: Model, ids: Tensor) -> Tensor:
    rows = [
        torch.cat([model(part[None], use_cache=False).logits[0] for part in row.split(lengths)])
        for row, lengths in zip(ids, DOCUMENTS, strict=True)
    ]
    return torch.stack(rows)


@torch.no_grad()
def packed_is_separate(model: Model) -> None:
    ids = tokens(2, LENGTH)
    want = _separate(model, ids)
    assert_same(model(ids, position_ids=restarting()).logits, want)
    assert_same(model(ids, seq_idx=numbered()).logits, want)
    assert_same(model(ids, position_ids=restarting(), seq_idx=numbered()).logits, want)


@torch.no_grad()
def packed_and_cached_is_separate(model: Model) -> None:
    ids = tokens(2, LENGTH)
    want = _separate(model, ids)
    by_position, by_name = {"position_ids": restarting()}, {"seq_idx": numbered()}
    for named, chunkings in ((by_position, ([40, 23], [1] * LENGTH)), (by_name, ([17, 1, 45],))):
        for sizes in chunkings:
            cache, parts, at = HybridCache(model.config), [], 0
            for size in sizes:
                here = {key: value[:, at : at + size] for key, value in named.items()}
                parts.append(model(ids[:, at : at + size], past_key_values=cache, **here).logits)
                at += size
            assert_same(torch.cat(parts, dim=1), want)


@torch.no_grad()
def packed_and_padded_is_separate(model: Model) -> None:
    ids, mask = tokens(2, 80, seed=3), torch.zeros(2, 80, dtype=torch.long)
    positions, documents = torch.zeros_like(mask), torch.zeros_like(mask)
    for row, begin in enumerate((9, 17)):
        mask[row, begin : begin + LENGTH] = 1
    real = tokens(2, LENGTH)
    want = _separate(model, real)
    for target, source in ((ids, real), (positions, restarting()), (documents, numbered())):
        target[mask == 1] = source.flatten()
    for named in ({"position_ids": positions}, {"seq_idx": documents}):
        got = model(ids, attention_mask=mask, **named).logits
        assert_same(got[mask == 1].view_as(want), want)


@torch.no_grad()
def packed_padded_and_cached_is_separate(model: Model) -> None:
    """All at once: rows padded by different amounts, documents that begin anywhere, read in chunks."""
    ids, mask = tokens(2, 80, seed=3), torch.zeros(2, 80, dtype=torch.long)
    positions = torch.zeros_like(mask)
    for row, begin in enumerate((9, 17)):
        mask[row, begin : begin + LENGTH] = 1
    real = tokens(2, LENGTH)
    want = _separate(model, real)
    ids[mask == 1], positions[mask == 1] = real.flatten(), restarting().flatten()
    for sizes in ([33, 47], [8, 1, 1, 1, 38, 31], [16] * 5):
        cache, parts, at = HybridCache(model.config), [], 0
        for size in sizes:
            named = {"position_ids": positions[:, at : at + size], "attention_mask": mask[:, : at + size]}
            parts.append(model(ids[:, at : at + size], past_key_values=cache, **named).logits)
            at += size
        got = torch.cat(parts, dim=1)
        assert_same(got[mask == 1].view_as(want), want)


@torch.no_grad()
def positions_may_begin_anywhere(model: Model) -> None:
    """Position ids are what RoPE and the time encoding see; the cache goes on counting from the last."""
    ids, positions = tokens(2, LENGTH), torch.arange(LENGTH)[None] + torch.tensor([[7], [100]])
    want = model(ids, position_ids=positions).logits
    cache = HybridCache(model.config)
    parts = [model(ids[:, :20], position_ids=positions[:, :20], past_key_values=cache).logits]
    parts += [model(ids[:, 20:21], past_key_values=cache).logits, model(ids[:, 21:], past_key_values=cache).logits]
    assert_same(torch.cat(parts, dim=1), want)


@torch.no_grad()
def what_is_not_named_goes_on(model: Model) -> None:
    """Tokens without seq_idx or position_ids belong to the document before them, and count on from it."""
    ids, first = tokens(2, LENGTH), 30
    positions = torch.cat([torch.arange(first) + 9, torch.arange(LENGTH - first)])[None].expand(2, -1)
    documents = (torch.arange(LENGTH) >= first).long()[None].expand(2, -1)
    want = model(ids, position_ids=positions).logits
    cache = HybridCache(model.config)
    parts = [
        model(ids[:, :20], position_ids=positions[:, :20], seq_idx=documents[:, :20], past_key_values=cache).logits
    ]
    parts += [model(ids[:, 20:25], past_key_values=cache).logits]
    parts += [model(ids[:, 25:40], seq_idx=documents[:, 25:40], past_key_values=cache).logits]
    parts += [model(ids[:, 40:], past_key_values=cache).logits]
    assert_same(torch.cat(parts, dim=1), want)
    cache = HybridCache(model.config)
    parts = [model(ids[:, :20], seq_idx=documents[:, :20], past_key_values=cache).logits]
    parts += [model(ids[:, 20:first], past_key_values=cache).logits]
    parts += [model(ids[:, first:], seq_idx=documents[:, first:], past_key_values=cache).logits]
    assert_same(torch.cat(parts, dim=1), model(ids, seq_idx=documents).logits)


def packed_gradients_are_separate(model: Model) -> None:
    ids, weight = tokens(2, LENGTH), torch.randn(2, LENGTH, VOCAB)
    want = gradients(model, (_separate(model, ids) * weight).sum())
    for named in ({"position_ids": restarting()}, {"seq_idx": numbered()}):
        logits = model(ids, use_cache=False, **named).logits
        assert_same_gradients(gradients(model, (logits * weight).sum()), want)


@torch.no_grad()
def the_future_never_leaks(model: Model) -> None:
    ids = tokens(2, LENGTH)
    before = model(ids).logits
    for t in (1, 8, 30, 62):
        changed = ids.clone()
        changed[:, t:] = tokens(2, LENGTH - t, seed=t)
        after = model(changed).logits
        assert_same(after[:, :t], before[:, :t], 1e-6)
        assert not torch.equal(after[:, t], before[:, t])


@torch.no_grad()
def documents_never_leak(model: Model) -> None:
    """Whatever the other documents of the row say, and however loudly."""
    ids = tokens(2, LENGTH)
    embeds = model.model.embed_tokens(ids)
    before = model(inputs_embeds=embeds, position_ids=restarting()).logits
    for row, lengths in enumerate(DOCUMENTS):
        begin, end = lengths[0], lengths[0] + lengths[1]
        changed = embeds.clone()
        changed[row, :begin] *= 30.0
        changed[row, end:] *= -30.0
        after = model(inputs_embeds=changed, position_ids=restarting()).logits
        assert_same(after[row, begin:end], before[row, begin:end], 1e-6)


def the_loss_stops_at_documents(model: Model) -> None:
    ids = tokens(2, LENGTH)
    logits = model(ids, position_ids=restarting()).logits
    targets = ids[:, 1:].masked_fill(restarting()[:, 1:] == 0, -100)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    for named in ({"position_ids": restarting()}, {"seq_idx": numbered()}):
        assert_same(model(ids, labels=ids, **named).loss, want)


COLUMNS = [
    packed_is_separate,
    packed_and_cached_is_separate,
    packed_and_padded_is_separate,
    packed_padded_and_cached_is_separate,
    positions_may_begin_anywhere,
    what_is_not_named_goes_on,
    packed_gradients_are_separate,
    the_future_never_leaks,
    documents_never_leak,
    the_loss_stops_at_documents,
]
