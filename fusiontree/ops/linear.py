"""x Wᵀ, with a kernel of its own for the few rows of a decoding step on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops import native

# Rows up to which the kernel wins, measured with 2 threads of an AVX-512 machine that multiplies bf16 in hardware.
_MOST_ROWS = {torch.bfloat16: 2, torch.float32: native.MAX_ROWS}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, I) times weight (O, I) transposed, plus bias (O,) → (…, O), in x's dtype."""
    out, size = weight.shape
    rows = x.numel() // size
    kernel = native.kernel("gemv", rows, x, weight)
    if kernel is None or rows > _MOST_ROWS[weight.dtype] or x.shape[-1] != size or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    wide = x.float().contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    kernel(weight.data_ptr(), wide.data_ptr(), y.data_ptr(), rows, out, size)
    return y if bias is None else y + bias
