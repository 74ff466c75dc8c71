"""Weights of transformers' models in ours: the same logits from `HybridLanguageModel`.

Each converter names what the foreign model has that ours does not and refuses it, rather than dropping it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig
from fusiontree.models.hybrid_model import HybridLanguageModel
from fusiontree.models.presets import preset

_FP32 = ("A_log", "dt_bias", "D")
_ROPE_SCALING = {"default": "none", "linear": "linear"}  # transformers' names → ours
Tensors = dict[str, Tensor]


def from_llama(model: PreTrainedModel) -> HybridLanguageModel:
    """A `LlamaForCausalLM` or `MistralForCausalLM` as ours; ConfigError for forms that ours lacks."""
    return _with_weights(model, _llama_config(model.config), _llama_layer)


def from_mamba2(model: PreTrainedModel) -> HybridLanguageModel:
    """A `Mamba2ForCausalLM` as ours; ConfigError for forms that ours lacks."""
    return _with_weights(model, _mamba2_config(model.config), _mamba2_layer)


def _llama_config(theirs: Any) -> HybridConfig:
    _require(theirs, "model_type", "llama", "mistral")
    _require(theirs, "hidden_act", "silu")
    _require(theirs, "attention_bias", False, None)
    _require(theirs, "mlp_bias", False, None)
    rope = dict(theirs.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_SCALING:
        raise ConfigError(f"rope_parameters.rope_type={kind!r}: must be one of {', '.join(_ROPE_SCALING)}")
    return preset(
        "llama",
        num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads,
        sliding_window=getattr(theirs, "sliding_window", None),
        intermediate_size=theirs.intermediate_size,
        max_position_embeddings=theirs.max_position_embeddings,
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling=_ROPE_SCALING[kind],
        rope_factor=rope.get("factor", 1.0),
        norm_eps=theirs.rms_norm_eps,
        **_shared(theirs),
    )


def _mamba2_config(theirs: Any) -> HybridConfig:
    _require(theirs, "model_type", "mamba2")
    _require(theirs, "hidden_act", "silu")
    _require(theirs, "use_bias", False)
    return preset(
        "mamba2",
        num_attention_heads=1,
        mamba_d_state=theirs.state_size,
        mamba_d_conv=theirs.conv_kernel,
        mamba_expand=theirs.expand,
        mamba_head_dim=theirs.head_dim,
        mamba_n_groups=theirs.n_groups,
        mamba_dt_limit=tuple(theirs.time_step_limit),
        norm_eps=theirs.layer_norm_epsilon,
        **_shared(theirs),
    )


def _shared(theirs: Any) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "initializer_range",
        "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return {name: getattr(theirs, name) for name in names}


def _require(config: Any, name: str, *allowed: Any) -> None:
    value = getattr(config, name, None)
    if value not in allowed:
        raise ConfigError(f"{config.model_type}: {name}={value!r} cannot be converted; allowed: {allowed[0]!r}")


def _llama_layer(theirs: Tensors, i: int) -> Tensors:
    t = _under(theirs, f"model.layers.{i}.")
    attention = "mixers.attention."
    return {
        "norm.weight": t["input_layernorm.weight"],
        attention + "qkv_proj.weight": torch.cat([t[f"self_attn.{name}_proj.weight"] for name in "qkv"]),
        attention + "o_proj.weight": t["self_attn.o_proj.weight"],
        "mlp_norm.weight": t["post_attention_layernorm.weight"],
        "mlp.gate_up_proj.weight": torch.cat([t["mlp.gate_proj.weight"], t["mlp.up_proj.weight"]]),
        "mlp.down_proj.weight": t["mlp.down_proj.weight"],
    }


def _mamba2_layer(theirs: Tensors, i: int) -> Tensors:
    t = _under(theirs, f"backbone.layers.{i}.")
    mixer = _under(t, "mixer.")
    conv = mixer["conv1d.weight"]
    ours = {name: mixer[name].float() for name in _FP32}
    ours |= {name: mixer[name] for name in ("in_proj.weight", "norm.weight", "out_proj.weight")}
    ours["conv_weight"] = conv.squeeze(1)
    ours["conv_bias"] = mixer.get("conv1d.bias", conv.new_zeros(conv.shape[0]))  # no bias is a bias of zero
    return {"norm.weight": t["norm.weight"]} | {f"mixers.mamba.{name}": tensor for name, tensor in ours.items()}


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _with_weights(
    model: PreTrainedModel, config: HybridConfig, layer: Callable[[Tensors, int], Tensors]
) -> HybridLanguageModel:
    theirs = {name: t.detach() for name, t in model.state_dict().items()}
    body, embedding, norm = {
        "mamba2": ("backbone", "embeddings", "norm_f"),
    }.get(model.config.model_type, ("model", "embed_tokens", "norm"))
    tensors = {
        "model.embed_tokens.weight": theirs[f"{body}.{embedding}.weight"],
        "model.norm.weight": theirs[f"{body}.{norm}.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{i}.{name}": t for name, t in layer(theirs, i).items()}
    ours = HybridLanguageModel(config)
    for name, parameter in ours.named_parameters():
        if parameter.shape != tensors[name].shape:
            raise ConfigError(f"{name}: shape {tuple(tensors[name].shape)} does not fit {tuple(parameter.shape)}")
        parameter.data = tensors[name].clone()  # their dtype and device too
    if model.generation_config is not None:
        ours.generation_config = copy.deepcopy(model.generation_config)
    return ours.eval()
