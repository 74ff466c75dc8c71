"""Window and full attention against the definition, forward and backward; no L×L for windows."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusiontree.models.positions import alibi_slopes
from fusiontree.ops import attention, attention_reference
from tests.models.kinds import assert_same, assert_same_gradient
from tests.ops.poison import poisoned_memory


def definition(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, reach: Tensor | None, slopes: Tensor | None = None
) -> Tensor:
    """Each query by itself, in float64: its visible keys, their softmax."""
    batch, heads, length, size = q.shape
    share, keys = heads // k.shape[1], k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    rows = []
    for b in range(batch):
        outs = []
        for i in range(length):
            slot = keys - length + i
            seen = slot + 1
            if window is not None:
                seen = min(seen, window)
            if reach is not None:
                seen = min(seen, int(reach[b, i]))
            mine = slice(slot + 1 - seen, slot + 1)
            scores = (k[b, :, mine] @ q[b, :, i, :, None])[..., 0] / size**0.5
            if slopes is not None:
                scores = scores - slopes[:, None] * torch.arange(seen - 1, -1, -1)
            weights = torch.softmax(scores, dim=-1)
            outs.append((weights[:, None] @ v[b, :, mine])[:, 0])
        rows.append(torch.stack(outs, dim=1))
    return torch.stack(rows)


def some_reach(batch: int, length: int, past: int, seed: int) -> Tensor:
    """What packed rows have: 1 at a document's begin, one more with each token, cached tokens counted."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.empty(batch, length, dtype=torch.long)
    for b in range(batch):
        age = int(torch.randint(0, past + 1, (1,), generator=generator))
        for i in range(length):
            age = 1 if torch.rand(1, generator=generator) < 0.1 else age + 1
            reach[b, i] = age
    return reach


def check(
    batch: int, heads: int, kv_heads: int, length: int, past: int, window: int | None, packed: bool, seed: int = 0,
    slopes: Tensor | None = None,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, length, 4, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads, past + length, 4, requires_grad=True) for _ in "kv")
    reach = some_reach(batch, length, past, seed) if packed else None
    with poisoned_memory():
        got = attention(q, k, v, window, reach, None, slopes)
        weight = torch.randn(got.shape)
        grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    want = definition(q, k, v, window, reach, slopes)
    assert_same(got, want)
    assert_same(attention_reference(q, k, v, window, reach, slopes), want)
    for ours, theirs in zip(grads, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        assert_same_gradient(ours, theirs, weight)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [5, 40, None])
def test_alibi(window: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a window, whole, in blocks of queries, and for one query that shares its key head."""
    slopes = alibi_slopes(6, torch.device("cpu"))
    for length, past in ((63, 0), (63, 40), (1, 40)):
        check(2, 6, 3, length, past, window, packed, slopes=slopes)
    monkeypatch.setattr(sys.modules["fusiontree.ops.attention"], "_BLOCK_BUDGET", 103 * 6 * 20)
    check(2, 6, 3, 63, 40, window, packed, slopes=slopes)


def test_slopes_are_the_papers() -> None:
    def slopes(heads: int) -> list[float]:
        return alibi_slopes(heads, torch.device("cpu")).tolist()

    assert slopes(1) == [2**-8] and slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(3) == pytest.approx([2**-4, 2**-8, 2**-2])
    assert slopes(12)[8:] == pytest.approx([2 ** -(i / 2) for i in (1, 3, 5, 7)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 62, 63, 64, 200, None])
def test_windows(window: int | None, packed: bool) -> None:
    for past in (0, 1, 40):
        check(2, 4, 2, 63, past, window, packed, seed=past)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 100])
def test_lengths_and_groups(length: int, kv_heads: int) -> None:
    for window in (1, 3, 17, None):
        for packed in (False, True):
            check(2, 4, kv_heads, length, 9, window, packed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    length=st.integers(1, 70),
    past=st.integers(0, 40),
    window=st.one_of(st.none(), st.integers(1, 80)),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, kv_heads, share, length, past, window, packed, seed) -> None:
    check(batch, kv_heads * share, kv_heads, length, past, window, packed, seed)


def test_masks_are_remembered_for_the_same_reach_only() -> None:
    """Layers share masks; a memo filled at one shape must not serve another."""
    masks: dict = {}
    reach = some_reach(2, 50, 0, seed=1)
    for heads, kv_heads, window in ((4, 2, 5), (2, 1, 5), (4, 4, 9), (4, 2, None), (4, 2, 5)):
        q = torch.randn(2, heads, 50, 4)
        k, v = torch.randn(2, 2, kv_heads, 50, 4)
        assert_same(attention(q, k, v, window, reach, masks), definition(q, k, v, window, reach))


def test_global_heads_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[attention.__module__], "_BLOCK_BUDGET", 700)
    check(2, 4, 2, 63, 20, None, packed=True)
    check(2, 4, 2, 63, 20, None, packed=False)


class _Largest(TorchDispatchMode):
    """The most elements any op's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("past", [0, 1000])
def test_windows_build_nothing_of_length_squared(packed: bool, past: int) -> None:
    length, window = 4096, 16
    q = torch.randn(1, 2, length, 8, requires_grad=True)
    k, v = (torch.randn(1, 1, past + length, 8, requires_grad=True) for _ in "kv")
    reach = torch.arange(1, length + 1)[None].remainder(1500) + 1 if packed else None
    with _Largest() as largest:
        attention(q, k, v, window, reach).sum().backward()
    assert largest.elements < length * length / 16


def test_bf16_is_close() -> None:
    q, k, v = (torch.randn(2, 4, 100, 16) for _ in "qkv")
    for window in (7, None):
        for reach in (None, some_reach(2, 100, 0, seed=3)):
            want = attention(q, k, v, window, reach)
            got = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window, reach)
            assert got.dtype == torch.bfloat16
            assert_same(got.float(), want, 0.02)
