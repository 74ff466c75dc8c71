"""What a converter knows of a family of transformers' models, and the settings that a conversion must keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig
from fusiontree.models.convert.weights import Place

Places = dict[str, Place]


@dataclass(frozen=True)
class Family:
    """One model type: its config as ours and back, and where our tensors stand in its weights."""

    ours: Callable[[Any], HybridConfig]
    theirs: Callable[[HybridConfig], PreTrainedConfig]
    body: Callable[[HybridConfig], Places]
    layer: Callable[[HybridConfig], Places]
    prefix: str  # of a layer's names there, with its index to be filled in


def shared(theirs: Any) -> dict[str, Any]:
    """Settings of the same name and meaning."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "initializer_range", *_TOKENS,
    )  # fmt: skip
    return {name: getattr(theirs, name) for name in names}


_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def require(config: Any, name: str, *allowed: Any) -> None:
    """Refuse a form of theirs that ours lacks, rather than dropping it."""
    value = getattr(config, name, None)
    if value not in allowed:
        raise ConfigError(f"{config.model_type}: {name}={value!r} cannot be converted; allowed: {allowed[0]!r}")


def settings_that_matter(config: HybridConfig) -> dict[str, Any]:
    """All that decides a model's numbers, without settings that nothing in it reads."""
    specs = config.layer_specs
    names = [
        "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "norm_type", "norm_placement",
        "norm_eps", "embedding_norm", "mlp_type", "position_encoding",
    ]  # fmt: skip
    names += ["intermediate_size", "mlp_bias"] if config.mlp_type != "none" else []
    names += ["hidden_act"] if config.mlp_type == "mlp" else []
    names += ["parallel_norms"] if any(spec.block == "parallel" for spec in specs) else []
    names += ["fusion_rule"] if any(len(spec.mixers) == 2 for spec in specs) else []
    names += ["max_position_embeddings"] if config.position_encoding == "learned" else []
    if any("attention" in spec.mixers for spec in specs):
        names += ["num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"]
        rope = "rope" in (config.head_positions(True), config.head_positions(False))
        names += ["rope_theta", "rope_scaling"] if rope else []
        names += ["rope_factor"] if rope and config.rope_scaling != "none" else []
    if any("mamba" in spec.mixers for spec in specs):
        names += ["mamba_type", "mamba_d_state", "mamba_d_conv", "mamba_inner_size", "mamba_dt_limit"]
        names += ["mamba_head_dim", "mamba_n_groups"] if config.mamba_type == "mamba2" else ["mamba_rank"]
    found = {name: getattr(config, name) for name in names}
    found["mamba_dt_limit"] = tuple(config.mamba_dt_limit) if "mamba_dt_limit" in found else None
    for i, spec in enumerate(specs):
        wide = spec.global_heads if spec.sliding_window is not None else config.num_attention_heads
        attends = "attention" in spec.mixers
        found[f"layers[{i}]"] = (spec.block, spec.mixers, (spec.sliding_window, wide) if attends else None)
    return found
