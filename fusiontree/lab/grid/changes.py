"""The changes that `fusiontree ablate` knows by name: what differs from the base in each, as data."""

from __future__ import annotations

from typing import Any

from fusiontree.errors import ConfigError

CHANGES: dict[str, dict[str, Any]] = {
    "no_mamba": {"mixers": ["attention"]},
    "no_attention": {"mixers": ["mamba"]},
    "no_srte": {"srte": "none"},
    "learned_srte": {"srte": "learned"},
    "low_rank_srte": {"srte": "low_rank"},
    "pre_norm": {"norm_placement": "pre"},
    "sandwich_norm": {"norm_placement": "sandwich"},
    "post_norm": {"norm_placement": "post"},
    "gate_per_head": {"gate_granularity": "head"},
    "gate_per_token": {"gate_granularity": "token"},
    "gate_per_layer": {"gate_granularity": "layer"},
    "cross_fusion": {"cross_rank": 16},
    "pyramid_windows": {"window_growth": 4},
    "no_window": {"sliding_window": None},
    "no_global_heads": {"global_heads": 0},
    "swiglu": {"mlp_type": "swiglu"},
    "no_mlp": {"mlp_type": "none"},
    "relu": {"hidden_act": "relu"},
    "untied": {"tie_word_embeddings": False},
    "branch_dropout": {"drop_branch_prob": 0.1},
}


def named_change(name: str) -> dict[str, Any]:
    """The settings of a change; ConfigError for a name that there is not."""
    if name not in CHANGES:
        raise ConfigError(f"changes.{name}: not known by name; there are {', '.join(CHANGES)}; or give its settings")
    return dict(CHANGES[name])
