"""The model: layers as data, mixers side by side, a gate between them, and exact caches."""

from fusiontree.models.cache import HybridCache
from fusiontree.models.config import HybridConfig
from fusiontree.models.hybrid_model import HybridLanguageModel, HybridOutput

__all__ = ["HybridCache", "HybridConfig", "HybridLanguageModel", "HybridOutput"]
