"""The loss without logits against cross entropy of the logits: value, both gradients, what is ignored or refused."""

import sys

import pytest
import torch

from fusiontree.ops import linear_cross_entropy, linear_cross_entropy_reference
from tests.models.kinds import assert_same, off
from tests.ops.poison import poisoned_memory


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(count, 12, requires_grad=True), torch.randn(37, 12, requires_grad=True)
    targets = torch.randint(37, (count,)).masked_fill(torch.rand(count) < 0.3, -100)
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 37 * 4, 37 * 1000])
def test_value_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "_CHUNK_ELEMENTS", chunk)
    for count in (0, 1, 13):
        hidden, weight, targets = inputs(count)
        with poisoned_memory():
            got = linear_cross_entropy(hidden, weight, targets)
            grads = torch.autograd.grad(got / 3, (hidden, weight))
        want = linear_cross_entropy_reference(hidden, weight, targets)
        assert got.dtype == torch.float32
        assert_same(got, want)
        for ours, theirs in zip(grads, torch.autograd.grad(want / 3, (hidden, weight)), strict=True):
            assert_same(ours, theirs)


def test_nothing_counts_when_all_is_ignored() -> None:
    hidden, weight, targets = inputs(5)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_autocast() -> None:
    hidden, weight, targets = inputs(13)
    want = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(got, (hidden, weight))
    assert got.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    assert off(got, want) < 0.01


@pytest.mark.parametrize("target", [-1, 37, -99])
def test_targets_outside_the_vocabulary_are_refused(target: int) -> None:
    hidden, weight, targets = inputs(5)
    targets[2] = target
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = inputs(5)
    loss = linear_cross_entropy(hidden, weight, targets).square()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
