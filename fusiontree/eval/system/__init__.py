"""How fast a causal language model runs and how many bytes it holds, several models side by side."""

from fusiontree.eval.system.holdings import cache_bytes, cache_parts, weight_bytes
from fusiontree.eval.system.memory import MemoryResult, measure_memory
from fusiontree.eval.system.speed import SpeedResult, measure_speed

__all__ = [
    "MemoryResult",
    "SpeedResult",
    "cache_bytes",
    "cache_parts",
    "measure_memory",
    "measure_speed",
    "weight_bytes",
]
