"""Columns of the contract: what the cache promises."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fusiontree.models import HybridCache, HybridLanguageModel, account
from tests.models.kinds import assert_same, tokens

Model = HybridLanguageModel
LENGTH = 63
CHUNKINGS = ([7] * 9, [1, 62], [62, 1], [20, 43], [5, 1, 1, 30, 2, 24], [6, 4, 5, 48])


def feed(model: Model, ids: Tensor, sizes: list[int], cache: HybridCache | None = None) -> tuple[Tensor, HybridCache]:
    """Logits of all chunks, one after another on one cache."""
    cache = HybridCache(model.config) if cache is None else cache
    parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1), cache


def _whole(model: Model) -> tuple[Tensor, Tensor]:
    ids = tokens(2, LENGTH)
    return ids, model(ids, use_cache=False).logits


def assert_same_state(got: HybridCache, want: HybridCache, window_slack: bool = True) -> None:
    """Every part equal; a local buffer may hold older keys than the window needs."""
    for i, (ours, theirs) in enumerate(zip(got.layers, want.layers, strict=True)):
        parts, wanted = ours.parts(), theirs.parts()
        for name, value in parts.items():
            assert (value is None) == (wanted[name] is None), f"layer {i}: {name}"
            if value is None:
                continue
            reference = wanted[name]
            if name == "local" and window_slack:
                held = min(value.shape[3], reference.shape[3])
                value, reference = (t[:, :, :, t.shape[3] - held :] for t in (value, reference))
            assert_same(value, reference)


@torch.no_grad()
def token_by_token_is_whole(model: Model) -> None:
    ids, want = _whole(model)
    got, cache = feed(model, ids, [1] * LENGTH)
    assert_same(got, want)
    assert cache.get_seq_length() == LENGTH


@torch.no_grad()
def chunks_on_a_warm_cache_are_whole(model: Model) -> None:
    ids, want = _whole(model)
    last = None
    for sizes in CHUNKINGS:
        got, cache = feed(model, ids, sizes)
        assert_same(got, want)
        if last is not None:
            assert_same_state(cache, last)
        last = cache


def chunks_with_gradient_are_whole(model: Model) -> None:
    """The cache passes gradients on, so that a long text can be read in chunks in training."""
    ids = tokens(2, 23)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    cache = HybridCache(model.config)
    parts = [model(inputs_embeds=e, past_key_values=cache).logits for e in embeds.split([9, 1, 13], dim=1)]
    weight = torch.randn(2, 23, parts[0].shape[-1])
    (got,) = torch.autograd.grad((torch.cat(parts, 1) * weight).sum(), embeds)
    (want,) = torch.autograd.grad((model(inputs_embeds=embeds, use_cache=False).logits * weight).sum(), embeds)
    assert_same(got, want)


@torch.no_grad()
def a_fork_is_independent(model: Model) -> None:
    ids, want = _whole(model)
    _, cache = feed(model, ids[:, :40], [33, 7])
    twin = cache.fork()
    feed(model, tokens(2, 9, seed=5), [1, 1, 7], twin)
    twin_again = twin.fork()
    got, _ = feed(model, ids[:, 40:], [1] * 10 + [13], cache)
    assert_same(got, want[:, 40:])
    other = torch.cat([ids[:, :40], tokens(2, 9, seed=5), tokens(2, 4, seed=6)], dim=1)
    got, _ = feed(model, other[:, 49:], [1] * 4, twin_again)
    assert_same(got, model(other).logits[:, 49:])


@torch.no_grad()
def forks_take_turns(model: Model) -> None:
    """Three copies step side by side, each on its own text: nothing that one writes in place shows in another."""
    start, texts = tokens(1, 20), [tokens(1, 12, seed=seed) for seed in (1, 2, 3)]
    _, cache = feed(model, start, [15, 1, 1, 1, 1, 1])
    caches = [cache, cache.fork(), cache.fork()]
    pairs = list(zip(caches, texts, strict=True))
    steps = [[model(text[:, t : t + 1], past_key_values=held).logits for held, text in pairs] for t in range(12)]
    for i, text in enumerate(texts):
        got = torch.cat([step[i] for step in steps], dim=1)
        assert_same(got, model(torch.cat([start, text], dim=1)).logits[:, 20:])


@torch.no_grad()
def rolled_back_is_never_advanced(model: Model) -> None:
    """As assisted decoding does it: guess some tokens, take back the wrong ones, go on; over and over."""
    ids, want = _whole(model)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    at, wrong = 0, tokens(2, LENGTH, seed=9)
    for right, guessed in [(20, 3), (1, 0), (1, 5), (3, 7), (1, 1), (0, 4), (6, 1), (1, 2)] + [(2, 2)] * 10:
        chunk = torch.cat([ids[:, at : at + right], wrong[:, :guessed]], dim=1)
        got = model(chunk, past_key_values=cache).logits
        cache.crop(-guessed)
        assert_same(got[:, :right], want[:, at : at + right]) if right else None
        at += right
        assert cache.get_seq_length() == at
    got, _ = feed(model, ids[:, at:], [1] * (LENGTH - at), cache)
    assert_same(got, want[:, at:])


@torch.no_grad()
def several_forwards_are_rolled_back(model: Model) -> None:
    """As an assistant model is used: it guesses token by token, and then some of those forwards are taken back."""
    ids, want = _whole(model)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    text = torch.cat([ids[:, :18], tokens(2, 102, seed=9)], dim=1)
    feed(model, text, [11, 1, 1, 10] + [1] * 80 + [17], cache)
    twin = cache.fork()
    for held in (cache, twin):
        held.crop(-102)
        assert held.get_seq_length() == 18
        got, _ = feed(model, torch.cat([ids[:, 18:23], tokens(2, 3, seed=8)], dim=1), [5, 1, 1, 1], held)
        held.crop(-3)
        rest, _ = feed(model, ids[:, 23:], [1] * 7 + [33], held)
        assert_same(torch.cat([got[:, :5], rest], dim=1), want[:, 18:])


@torch.no_grad()
def a_saved_cache_goes_on(model: Model) -> None:
    ids, want = _whole(model)
    _, cache = feed(model, ids[:, :41], [30] + [1] * 11)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "state.safetensors")
        again = HybridCache(model.config).load(Path(folder) / "state.safetensors")
    assert_same_state(again, cache)
    got, _ = feed(model, ids[:, 41:], [1] * 22, again)
    assert_same(got, want[:, 41:])


@torch.no_grad()
def reordered_rows_go_on(model: Model) -> None:
    ids = tokens(3, LENGTH)
    want = model(ids).logits
    _, cache = feed(model, ids[:, :40], [39, 1])
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder_cache(rows)
    got, _ = feed(model, ids[rows, 40:], [1] * 9 + [14], cache)
    assert_same(got, want[rows, 40:])
    cache.reset()
    got, _ = feed(model, ids, [LENGTH], cache)
    assert_same(got, want)


@torch.no_grad()
def bytes_are_those_accounted(model: Model) -> None:
    for length in (1, 4, LENGTH):
        _, cache = feed(model, tokens(2, length), [length])
        states = account(model.config, length, 2).state_bytes
        assert sum(states.values()) == cache.state_bytes(), f"{length} tokens: {states}"


COLUMNS = [
    token_by_token_is_whole,
    chunks_on_a_warm_cache_are_whole,
    chunks_with_gradient_are_whole,
    a_fork_is_independent,
    forks_take_turns,
    rolled_back_is_never_advanced,
    several_forwards_are_rolled_back,
    a_saved_cache_goes_on,
    reordered_rows_go_on,
    bytes_are_those_accounted,
]
