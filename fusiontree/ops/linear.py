"""x Wᵀ, with a kernel of its own for the few rows of a decoding step on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops import native

_MAX_ROWS = 8  # as in gemv.c


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, I) times weight (O, I) transposed → (…, O), in x's dtype."""
    if x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= _MAX_ROWS * x.shape[-1]:
        y = _gemv(x, weight)
        if y is not None:
            return y
    return F.linear(x, weight)


def _gemv(x: Tensor, weight: Tensor) -> Tensor | None:
    """The product by the native kernel; None where it does not apply."""
    dtype = weight.dtype
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or x.dtype != dtype or not weight.is_contiguous():
        return None
    kernels = native.library()
    if kernels is None or dtype not in (torch.bfloat16, torch.float32) or weight.device.type != "cpu":
        return None
    function = kernels.gemv_bf16 if dtype == torch.bfloat16 else kernels.gemv_f32
    out, size = weight.shape
    wide = x.float().contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    function(weight.data_ptr(), wide.data_ptr(), y.data_ptr(), wide.numel() // size, out, size)
    return y
