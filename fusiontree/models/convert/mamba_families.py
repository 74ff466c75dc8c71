"""Mamba and Mamba-2."""

from __future__ import annotations

from typing import Any

from transformers import Mamba2Config, MambaConfig, PreTrainedConfig

from fusiontree.models.config import HybridConfig
from fusiontree.models.convert.family import Family, Places, require, shared
from fusiontree.models.convert.weights import Exact, Kernel, OrZero, Same
from fusiontree.models.presets import preset


def _common(theirs: Any) -> dict[str, Any]:
    require(theirs, "hidden_act", "silu")
    require(theirs, "use_bias", False)
    return {
        "num_attention_heads": 1,
        "mamba_d_state": theirs.state_size,
        "mamba_d_conv": theirs.conv_kernel,
        "mamba_expand": theirs.expand,
        "norm_eps": theirs.layer_norm_epsilon,
        **shared(theirs),
    }


def _their_common(config: HybridConfig) -> dict[str, Any]:
    return {
        **shared(config),
        "state_size": config.mamba_d_state,
        "conv_kernel": config.mamba_d_conv,
        "expand": _whole(config.mamba_expand),
        "layer_norm_epsilon": config.norm_eps,
    }


def _whole(value: float) -> int | float:
    """transformers wants a whole number where it is one."""
    return int(value) if value == int(value) else value


def _mamba2_ours(theirs: Any) -> HybridConfig:
    return preset(
        "mamba2",
        mamba_head_dim=theirs.head_dim,
        mamba_n_groups=theirs.n_groups,
        mamba_dt_limit=tuple(theirs.time_step_limit),
        **_common(theirs),
    )


def _mamba2_theirs(config: HybridConfig) -> PreTrainedConfig:
    return Mamba2Config(
        **_their_common(config),
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        n_groups=config.mamba_n_groups,
        time_step_limit=tuple(config.mamba_dt_limit),
        chunk_size=config.mamba_chunk_size,
    )


def _mamba_ours(theirs: Any) -> HybridConfig:
    return preset("mamba", mamba_dt_rank=int(theirs.time_step_rank), **_common(theirs))


def _mamba_theirs(config: HybridConfig) -> PreTrainedConfig:
    return MambaConfig(**_their_common(config), time_step_rank=config.mamba_rank)


def _body(config: HybridConfig) -> Places:
    return {
        "model.embed_tokens.weight": Same("backbone.embeddings.weight"),
        "model.norm.weight": Same("backbone.norm_f.weight"),
    }


def _layer(config: HybridConfig) -> Places:
    names = ["in_proj.weight", "out_proj.weight"]
    names += ["norm.weight"] if config.mamba_type == "mamba2" else ["x_proj.weight", "dt_proj.weight"]
    steps = "dt_bias" if config.mamba_type == "mamba2" else "dt_proj.bias"
    own: Places = {name: Same(f"mixer.{name}") for name in names}
    own |= {"A_log": Exact("mixer.A_log"), "D": Exact("mixer.D"), "dt_bias": Exact(f"mixer.{steps}")}
    own |= {
        "conv_weight": Kernel("mixer.conv1d.weight"),
        "conv_bias": OrZero("mixer.conv1d.bias", config.mamba_channels),
    }
    return {"norm.weight": Same("norm.weight"), **{f"mixers.mamba.{name}": place for name, place in own.items()}}


MAMBAS = {
    "mamba": Family(_mamba_ours, _mamba_theirs, _body, _layer, "backbone.layers.{}."),
    "mamba2": Family(_mamba2_ours, _mamba2_theirs, _body, _layer, "backbone.layers.{}."),
}
