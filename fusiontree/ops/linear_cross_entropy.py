"""Output head and cross entropy in one, without the (tokens × vocabulary) logits ever standing in memory.

Logits, softmax and gradient are formed for some tokens at a time and thrown away (the idea of Liger Kernel's fused
linear cross entropy, Hsu et al. 2024). Shapes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops.autocast import autocast_dtype

_IGNORED = -100
_CHUNK_ELEMENTS = 1 << 23  # logits that stand in memory at once


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets (T,), -100 ignored, of the cross entropy of hidden (T, H) times weight (V, H) transposed."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=_IGNORED, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same in chunks of tokens → fp32 scalar. Differentiable once."""
    dtype = autocast_dtype(hidden)
    total: Tensor = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets)
    return total


def tokens_at_once(vocabulary: int) -> int:
    """Tokens whose logits stand in memory together."""
    return max(1, _CHUNK_ELEMENTS // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        size = tokens_at_once(weight.shape[0])
        for begin in range(0, hidden.shape[0], size):
            rows = slice(begin, begin + size)
            loss, grad = _chunk(hidden[rows] @ weight.t(), targets[rows])
            total += loss
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = (None if t is None else t * grad.to(t.dtype) for t in ctx.saved_tensors)
        return grad_hidden, grad_weight, None


def _chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and the gradient with respect to the logits (t, V), in their dtype."""
    counted = targets != _IGNORED
    targets = targets.masked_fill(~counted, 0)[:, None]  # any other negative is refused by gather
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(log_probabilities.gather(1, targets)[:, 0] * counted).sum()
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
    return loss, grad.mul_(counted[:, None]).to(logits.dtype)
