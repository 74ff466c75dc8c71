"""A long text without gradients goes through in pieces: the same logits, cache and padding as in one go."""

import pytest
import torch

from fusiontree import HybridCache
from fusiontree.models import hybrid_model
from tests.models.kinds import KINDS, assert_same, build, tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [7, 16, 64])
def test_in_pieces_is_whole(kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(kind), tokens(2, 63)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    mask[1, 30:34] = 0
    packed = torch.cat([torch.arange(25), torch.arange(30), torch.arange(8)])[None]
    arguments = [{}, {"attention_mask": mask}, {"position_ids": packed}, {"seq_idx": packed.eq(0).cumsum(1)}]
    whole = [model(ids, use_cache=False, **extra).logits.detach() for extra in arguments]
    monkeypatch.setattr(hybrid_model, "piece_length", lambda x: piece)
    with torch.no_grad():
        for want, extra in zip(whole, arguments, strict=True):
            assert_same(model(ids, use_cache=False, **extra).logits[mask.bool()], want[mask.bool()])
        # A warm cache goes on in pieces, and its state is that of the whole.
        cache = HybridCache(model.config)
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        rest = model(ids[:, 9:], attention_mask=mask, past_key_values=cache, logits_to_keep=3)
        assert_same(rest.logits, whole[1][:, -3:])
        assert cache.get_seq_length() == 63
