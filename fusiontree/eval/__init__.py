"""Measuring models: how well they predict text and how fast they run."""

from fusiontree.eval.perplexity import LossResult, evaluate_loss, token_byte_lengths, token_losses
from fusiontree.eval.system import SpeedResult, cache_bytes, measure_speed, weight_bytes

__all__ = [
    "LossResult",
    "SpeedResult",
    "cache_bytes",
    "evaluate_loss",
    "measure_speed",
    "token_byte_lengths",
    "token_losses",
    "weight_bytes",
]
