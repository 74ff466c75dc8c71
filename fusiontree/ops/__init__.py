"""The mathematics of time: each op has a plain reference, a fast version of all tokens, and a one-token step."""

from fusiontree.ops.attention import attention, attention_reference
from fusiontree.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from fusiontree.ops.linear import linear
from fusiontree.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fusiontree.ops.mamba_step import (
    MambaSizes,
    MambaWeights,
    gated_rms_norm,
    mamba_step,
    mamba_step_reference,
    step_sizes,
)
from fusiontree.ops.rms_norm import rms_norm, rms_norm_reference
from fusiontree.ops.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from fusiontree.ops.ssd import ssd, ssd_reference, ssd_step

__all__ = [
    "MambaSizes",
    "MambaWeights",
    "attention",
    "attention_reference",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_step",
    "gated_rms_norm",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "mamba_step",
    "mamba_step_reference",
    "rms_norm",
    "rms_norm_reference",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
    "ssd",
    "ssd_reference",
    "ssd_step",
    "step_sizes",
]
