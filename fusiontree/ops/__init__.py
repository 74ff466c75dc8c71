"""The mathematics of time: each op has a plain reference, a fast version of all tokens at once, and a one-token step."""

from fusiontree.ops.attention import attention, attention_reference
from fusiontree.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from fusiontree.ops.linear import linear
from fusiontree.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fusiontree.ops.ssd import ssd, ssd_reference, ssd_step

__all__ = [
    "attention",
    "attention_reference",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_step",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "ssd",
    "ssd_reference",
    "ssd_step",
]
