"""Named configurations: FusionTree with its variants and its parents, as data for the one model class.

A preset is what differs from `HybridConfig`'s defaults, made from the settings that are asked for beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig

Settings = dict[str, Any]
_PRE_NORM: Settings = {"norm_placement": "pre", "norm_eps": 1e-5, "srte": "none"}
_TRANSFORMER: Settings = {
    "block": "sequential", "mixers": ["attention"], "sliding_window": None, "global_heads": 0, **_PRE_NORM,
}  # fmt: skip


def _fusiontree(settings: Settings) -> Settings:
    """V1: Mamba and attention side by side in every layer, fused by the gate; `HybridConfig`'s own defaults."""
    return {}


def _pyramid(settings: Settings) -> Settings:
    """V2: the window grows with depth, to four times its first width."""
    return {"window_growth": 4}


def _cross(settings: Settings) -> Settings:
    """V3: each branch glances at the other through a sixteenth of the width, 64 at most."""
    return {"cross_rank": max(1, min(64, _hidden(settings) // 16))}


def _per_head(settings: Settings) -> Settings:
    """V4: a gate per head in place of one per channel."""
    return {"gate_granularity": "head"}


def _llama(settings: Settings) -> Settings:
    """LLaMA (Touvron et al. 2023): pre-norm, RoPE, all heads global, SwiGLU of 8/3·H."""
    return {**_TRANSFORMER, "mlp_type": "swiglu", "hidden_act": "silu", "intermediate_size": _two_thirds(settings)}


def _mamba2(settings: Settings) -> Settings:
    """A pure Mamba-2: pre-norm, no MLP, state 128 as in Dao & Gu 2024."""
    return {"block": "sequential", "mixers": ["mamba"], "mlp_type": "none", "mamba_d_state": 128, **_PRE_NORM}


PRESETS: dict[str, Callable[[Settings], Settings]] = {
    "fusiontree": _fusiontree,
    "fusiontree_v2": _pyramid,
    "fusiontree_v3": _cross,
    "fusiontree_v4": _per_head,
    "llama": _llama,
    "mamba2": _mamba2,
}


def preset(name: str, **overrides: Any) -> HybridConfig:
    """The named configuration with any `HybridConfig` setting replaced; ConfigError for an unknown name or setting."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    known = [field.name for field in fields(HybridConfig)]
    for key in overrides:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"preset {name!r}: unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
    return HybridConfig(**{**PRESETS[name](overrides), **overrides})


def _whole(settings: Settings, name: str) -> int:
    """A size that is asked for, or the default; 0 for a wrong type, which the config itself refuses."""
    value = settings.get(name, getattr(HybridConfig, name))
    return value if isinstance(value, int) else 0


def _hidden(settings: Settings) -> int:
    return _whole(settings, "hidden_size")


def _two_thirds(settings: Settings) -> int:
    """A GLU's inner size with as many weights as an MLP of 4·H has: 8/3·H, rounded up to a multiple of 8."""
    return -(-8 * _hidden(settings) // 24) * 8
