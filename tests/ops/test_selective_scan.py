"""The chunked selective scan equals the recurrence written out, forward and backward."""

import importlib

import pytest
import torch
from torch import Tensor

from fusiontree.ops import selective_scan, selective_scan_reference, selective_scan_step
from tests.models.kinds import assert_same, assert_same_gradient
from tests.ops.poison import poisoned_memory

LENGTHS = [1, 2, 15, 16, 17, 63, 100, 300]


def inputs(length: int, batch: int = 2, channels: int = 6, state: int = 5, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    dt = torch.nn.functional.softplus(normal(batch, length, channels) * 2)
    A = -torch.exp(normal(channels, state))
    return [
        normal(batch, length, channels), dt, A, normal(batch, length, state), normal(batch, length, state),
        normal(channels),
    ]  # fmt: skip


def documents(length: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_forward_and_backward(length: int, packed: bool, warm: bool) -> None:
    given = [t.requires_grad_() for t in inputs(length)]
    initial = torch.randn(2, 6, 5).requires_grad_() if warm else None
    more = {"starts": documents(length) if packed else None, "initial_state": initial}
    wanted = [*given, *([initial] if warm else [])]
    with poisoned_memory():
        y, state = selective_scan(*given, **more)
        want_y, want_state = selective_scan_reference(*given, **more)
        assert_same(y, want_y)
        assert_same(state, want_state)
        up_y, up_state = torch.randn_like(y), torch.randn_like(state)
        got = torch.autograd.grad([y, state], wanted, [up_y, up_state])
        want = torch.autograd.grad([want_y, want_state], wanted, [up_y, up_state])
    for ours, theirs in zip(got, want, strict=True):
        assert_same_gradient(ours, theirs, up_y)


def test_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fusiontree.ops.selective_scan")  # the function of that name hides it
    given = inputs(100)
    want = selective_scan_reference(*given, starts=documents(100))
    for size in (1, 7, 16, 48):
        monkeypatch.setattr(module, "tokens_at_once", lambda *sizes, size=size: size)
        for ours, theirs in zip(selective_scan(*given, starts=documents(100)), want, strict=True):
            assert_same(ours, theirs)


def test_large_steps_neither_overflow_nor_lose_the_rest() -> None:
    x, dt, A, B, C, D = inputs(200)
    dt = dt * 200
    dt[:, 50:60] = 0
    got, want = selective_scan(x, dt, A, B, C, D), selective_scan_reference(x, dt, A, B, C, D)
    assert all(t.isfinite().all() for t in got)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)


def test_tokens_of_no_step_leave_the_state() -> None:
    x, dt, A, B, C, D = inputs(40)
    dt[:, 10:] = 0
    _, whole = selective_scan(x, dt, A, B, C, D)
    _, begun = selective_scan(x[:, :10], dt[:, :10], A, B[:, :10], C[:, :10], D)
    assert_same(whole, begun)


def test_step_and_chunks_carry_the_state() -> None:
    x, dt, A, B, C, D = inputs(50)
    want, final = selective_scan(x, dt, A, B, C, D)
    state, outputs = None, []
    for piece in (slice(0, 20), slice(20, 21), slice(21, 50)):
        y, state = selective_scan(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], D, None, state)
        outputs.append(y)
    assert_same(torch.cat(outputs, 1), want)
    assert_same(state, final)
    y, again = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, final)
    assert again.dtype == torch.float32 and y.shape == (2, 6) and not torch.equal(again, final)


def test_bf16_in_bf16_out_state_in_fp32() -> None:
    x, dt, A, B, C, D = inputs(60)
    low = [t.bfloat16() for t in (x, B, C)]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = selective_scan(low[0], dt, A, low[1], low[2], D)
    want, _ = selective_scan_reference(low[0].float(), dt, A, low[1].float(), low[2].float(), D)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_same(y.float(), want, 1e-2)
