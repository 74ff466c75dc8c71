"""The convolution of all tokens at once against its definition, forward and backward, with state and documents."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusiontree.ops import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from tests.models.kinds import assert_same
from tests.ops.poison import poisoned_memory


def definition(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, state: Tensor | None):
    """The sum over taps in float64, tap by tap with the document of each input."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    past = x.new_zeros(batch, width - 1, channels) if state is None else state.transpose(1, 2)
    line = torch.cat([past, x], dim=1).double()
    starts = torch.zeros(batch, length, dtype=torch.bool) if starts is None else starts
    document = F.pad(starts.long(), (width - 1, 0)).cumsum(1)
    y = torch.zeros(batch, length, channels, dtype=torch.double)
    for tap in range(width):
        same = document[:, tap : tap + length] == document[:, width - 1 :]
        y = y + torch.where(same[..., None], line[:, tap : tap + length] * weight[:, tap].double(), 0.0)
    y = y + bias.double()
    kept = torch.where((document == document[:, -1:])[..., None], line, 0.0)[:, length:]
    return F.silu(y), kept.transpose(1, 2)


def check(batch: int, length: int, channels: int, width: int, often: float, warm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    leaves = {
        "x": torch.randn(batch, length, channels, requires_grad=True),
        "weight": torch.randn(channels, width, requires_grad=True),
        "bias": torch.randn(channels, requires_grad=True),
        "state": torch.randn(batch, channels, width - 1, requires_grad=True) if warm and width > 1 else None,
    }
    starts = torch.rand(batch, length) < often if often else None
    arguments = (leaves["x"], leaves["weight"], leaves["bias"], starts, leaves["state"])
    given_leaves = [t for t in leaves.values() if t is not None]
    with poisoned_memory():
        y, state = causal_conv1d(*arguments)
        weights = torch.randn(y.shape), torch.randn(state.shape)
        loss = (y * weights[0]).sum() + (state * weights[1]).sum()
        got = torch.autograd.grad(loss, given_leaves, allow_unused=True)
    want_y, want_state = definition(*arguments)
    want_loss = (want_y * weights[0]).sum() + (want_state * weights[1]).sum()
    want = torch.autograd.grad(want_loss, given_leaves, allow_unused=True)
    assert_same(y, want_y)
    assert_same(state, want_state)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(torch.zeros(1) if ours is None else ours, torch.zeros(1) if theirs is None else theirs)
    reference_y, reference_state = causal_conv1d_reference(*arguments)
    assert_same(reference_y, want_y)
    assert_same(reference_state, want_state)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 100])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_lengths_and_widths(length: int, width: int) -> None:
    for often, warm in ((0.0, False), (0.0, True), (0.3, True), (1.0, False)):
        check(2, length, 5, width, often, warm, seed=length)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    channels=st.integers(1, 9),
    width=st.integers(1, 6),
    often=st.sampled_from([0.0, 0.1, 0.5]),
    warm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, length, channels, width, often, warm, seed) -> None:
    check(batch, length, channels, width, often, warm, seed)


def test_steps_are_the_whole() -> None:
    x, weight, bias = torch.randn(2, 30, 6), torch.randn(6, 4), torch.randn(6)
    whole, end = causal_conv1d(x, weight, bias)
    state, ys = torch.zeros(2, 6, 3), []
    for t in range(30):
        y, state = causal_conv1d_step(x[:, t], weight, bias, state)
        ys.append(y)
    assert_same(torch.stack(ys, dim=1), whole)
    assert_same(state, end)


@pytest.mark.parametrize(("batch", "width"), [(1, 2), (1, 4), (2, 4)])
def test_the_state_keeps_nothing_else_alive(batch: int, width: int) -> None:
    """A view of the input would keep it in memory for as long as a cache lives, once per layer."""
    _, state = causal_conv1d(torch.randn(batch, 500, 6), torch.randn(6, width), torch.randn(6))
    assert state.untyped_storage().nbytes() == state.numel() * 4


def test_bf16_is_close() -> None:
    x, weight, bias, state = torch.randn(2, 50, 16), torch.randn(16, 4), torch.randn(16), torch.randn(2, 16, 3)
    starts = torch.rand(2, 50) < 0.1
    want, want_state = definition(x, weight, bias, starts, state)
    y, new_state = causal_conv1d(x.bfloat16(), weight, bias, starts, state.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_same(y.float(), want.float(), 0.02)
    assert_same(new_state.float(), want_state.float(), 0.01)
