"""The chunked scan and the one-token step against the recurrence in float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusiontree.ops import ssd, ssd_reference, ssd_step
from tests.models.kinds import assert_same, assert_same_gradient
from tests.ops.poison import poisoned_memory

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def recurrence(x, dt, A, B, C, D, starts, state):
    """The equations in float64, written here a second time on purpose."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, length, heads, size = x.shape
    share = heads // B.shape[2]
    B, C = (t.repeat_interleave(share, dim=2) for t in (B, C))
    h = torch.zeros(batch, heads, size, B.shape[-1], dtype=torch.double) if state is None else state.double()
    ys = []
    for t in range(length):
        if starts is not None:
            h = torch.where(starts[:, t][:, None, None, None], 0.0, h)
        h = h * torch.exp(dt[:, t] * A)[..., None, None]
        h = h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y = torch.einsum("bhpn,bhn->bhp", h, C[:, t])
        ys.append(y if D is None else y + D.double()[:, None] * x[:, t])
    return torch.stack(ys, dim=1), h


def inputs(
    batch: int, length: int, heads: int, size: int, groups: int, state: int, seed: int = 0, warm: bool = True
) -> dict[str, Tensor | None]:
    torch.manual_seed(seed)
    return {
        "x": torch.randn(batch, length, heads, size, requires_grad=True),
        "dt": torch.nn.functional.softplus(torch.randn(batch, length, heads) - 1).requires_grad_(),
        "A": (-torch.empty(heads).uniform_(0.2, 4.0)).requires_grad_(),
        "B": torch.randn(batch, length, groups, state, requires_grad=True),
        "C": torch.randn(batch, length, groups, state, requires_grad=True),
        "D": torch.randn(heads, requires_grad=True),
        "state": torch.randn(batch, heads, size, state, requires_grad=True) if warm else None,
    }


def random_starts(batch: int, length: int, seed: int, often: float = 0.15) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < often


def check(args: dict[str, Tensor | None], starts: Tensor | None, chunk: int, tolerance: float = 1e-5) -> None:
    """Outputs, final state and every gradient."""
    leaves = {name: t for name, t in args.items() if t is not None}
    values = [args[name] for name in NAMES[:-1]]
    with poisoned_memory():
        y, final = ssd(*values, starts, args["state"], chunk)
        weights = torch.randn(y.shape), torch.randn(final.shape)
        loss = (y * weights[0]).sum() + (final * weights[1]).sum()
        got = torch.autograd.grad(loss, list(leaves.values()))
    want_y, want_final = recurrence(*values, starts, args["state"])
    want_loss = (want_y * weights[0].double()).sum() + (want_final * weights[1].double()).sum()
    want = torch.autograd.grad(want_loss, list(leaves.values()))
    assert final.dtype == torch.float32
    assert_same(y, want_y, tolerance)
    assert_same(final, want_final, tolerance)
    for name, ours, theirs in zip(leaves, got, want, strict=True):
        assert ours.shape == theirs.shape, name
        assert_same_gradient(ours, theirs, weights[0], 2 * tolerance)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 64, 65, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_odd_lengths(length: int, packed: bool) -> None:
    starts = random_starts(2, length, seed=length) if packed else None
    for warm in (False, True):
        check(inputs(2, length, 4, 3, 2, 5, seed=length, warm=warm), starts, chunk=8)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64, 256])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunks_and_groups(chunk: int, groups: int) -> None:
    check(inputs(1, 100, 4, 2, groups, 3, seed=chunk), random_starts(1, 100, seed=chunk), chunk)


@pytest.mark.parametrize("packed", [False, True])
def test_many_chunks(packed: bool) -> None:
    """More than one level of the scan over chunks: 32 and 32 · 32 of them."""
    for length in (33 * 2, 70 * 2 + 1):
        starts = random_starts(1, length, seed=length, often=0.02) if packed else None
        check(inputs(1, length, 2, 2, 1, 3, seed=length), starts, chunk=2)
    length = 32 * 33 + 5
    starts = random_starts(1, length, seed=1, often=0.005) if packed else None
    args = {name: None if t is None else t.detach() for name, t in inputs(1, length, 2, 2, 1, 3, seed=3).items()}
    args["dt"] = args["dt"] * 0.02  # so that the far past still counts
    values = [args[name] for name in NAMES[:-1]]
    got, want = ssd(*values, starts, args["state"], 1), recurrence(*values, starts, args["state"])
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 90),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    size=st.integers(1, 6),
    state=st.integers(1, 6),
    chunk=st.integers(1, 70),
    often=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, length, groups, per_group, size, state, chunk, often, warm, seed) -> None:
    args = inputs(batch, length, groups * per_group, size, groups, state, seed, warm)
    check(args, random_starts(batch, length, seed, often) if often else None, chunk, 2e-5)


def test_reference_and_step_are_the_recurrence() -> None:
    args = inputs(2, 21, 4, 3, 2, 5)
    starts = random_starts(2, 21, seed=4)
    values = [args[name] for name in NAMES[:-1]]
    want_y, want_state = recurrence(*values, starts, args["state"])
    y, final = ssd_reference(*values, starts, args["state"])
    assert_same(y, want_y)
    assert_same(final, want_state)
    x, dt, A, B, C, D = values
    y, after = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, args["state"])
    want_y, want_state = recurrence(x[:, :1], dt[:, :1], A, B[:, :1], C[:, :1], D, None, args["state"])
    assert_same(y, want_y[:, 0])
    assert_same(after, want_state)


def test_steps_of_zero_are_transparent() -> None:
    """dt = 0 is padding: the state passes it untouched, whatever x, B and C hold there."""
    args = {name: None if t is None else t.detach() for name, t in inputs(2, 40, 2, 3, 1, 4).items()}
    real = torch.rand(2, 40) < 0.6
    args["dt"] = args["dt"] * real[..., None]
    values = [args[name] for name in NAMES[:-1]]
    y, final = ssd(*values, None, args["state"], 8)
    for row in range(2):
        kept = [t[row : row + 1, real[row]] if t.ndim > 2 else t for t in values]
        alone, end = ssd(*kept, None, args["state"][row : row + 1], 8)
        assert_same(y[row : row + 1, real[row]], alone)
        assert_same(final[row : row + 1], end)


def test_strong_decay_stays_finite() -> None:
    """Decays that underflow within a chunk give zeros, and gradients without NaN."""
    args = inputs(1, 80, 2, 3, 1, 4)
    args["A"] = torch.tensor([-200.0, -1e-4], requires_grad=True)
    values = [args[name] for name in NAMES[:-1]]
    y, final = ssd(*values, random_starts(1, 80, seed=2), args["state"], 16)
    (y.sum() + final.sum()).backward()
    assert y.isfinite().all() and all(t.grad.isfinite().all() for t in args.values())
    want_y, want_final = recurrence(*values, random_starts(1, 80, seed=2), args["state"])
    assert_same(y, want_y)
    assert_same(final, want_final)


def test_the_final_state_keeps_nothing_else_alive() -> None:
    args = {name: None if t is None else t.detach() for name, t in inputs(1, 70, 1, 3, 1, 4).items()}
    for chunk in (1, 8, 100):
        _, final = ssd(*[args[name] for name in NAMES[:-1]], None, args["state"], chunk)
        assert final.untyped_storage().nbytes() == final.numel() * 4


def test_bf16_is_close_and_the_state_stays_fp32() -> None:
    args = {name: None if t is None else t.detach() for name, t in inputs(2, 100, 4, 8, 2, 16).items()}
    want_y, want_final = recurrence(*[args[n] for n in NAMES[:-1]], None, args["state"])
    for name in ("x", "B", "C"):
        args[name] = args[name].bfloat16()
    values = [args[name] for name in NAMES[:-1]]
    y, final = ssd(*values, None, args["state"], 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, final_again = ssd(*values, None, args["state"], 16)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(y, again) and torch.equal(final, final_again), "autocast must not change what is fp32"
    assert_same(y.float(), want_y.float(), 0.02)
    assert_same(final, want_final, 0.02)
