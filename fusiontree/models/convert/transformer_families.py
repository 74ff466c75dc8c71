"""LLaMA, Mistral, GPT-2, BLOOM and Falcon."""

from __future__ import annotations

from typing import Any

from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig
from fusiontree.models.convert.family import Family, Places, require, shared
from fusiontree.models.convert.weights import Interleaved, Same, Several, affine, norm
from fusiontree.models.presets import preset

_ROPE = {"default": "none", "linear": "linear", "yarn": "yarn"}  # transformers' names → ours
_ACTIVATIONS = {
    "gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu",
    "silu": "silu",
}  # fmt: skip
_QKV, _OUT = "mixers.attention.qkv_proj", "mixers.attention.o_proj"


def _rope(theirs: Any) -> dict[str, Any]:
    rope = dict(theirs.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE:
        raise ConfigError(f"rope_parameters.rope_type={kind!r}: must be one of {', '.join(_ROPE)}")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    odd = {name for name, value in rope.items() if name not in known and value is not None}
    if odd - ({"partial_rotary_factor"} if rope.get("partial_rotary_factor") == 1.0 else set()):
        raise ConfigError(f"rope_parameters.{min(odd)}={rope[min(odd)]!r} cannot be converted; leave it out")
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": _ROPE[kind],
        "rope_factor": rope.get("factor") or 1.0,
        "rope_original_length": rope.get("original_max_position_embeddings") if kind == "yarn" else None,
    }


def _their_rope(config: HybridConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _ROPE.items()}
    if config.rope_scaling not in names:
        raise ConfigError(f"rope_scaling={config.rope_scaling!r}: transformers has no such form; {', '.join(names)}")
    rope: dict[str, Any] = {"rope_type": names[config.rope_scaling], "rope_theta": config.rope_theta}
    rope |= {"factor": config.rope_factor} if config.rope_scaling != "none" else {}
    if config.rope_scaling == "yarn":
        rope["original_max_position_embeddings"] = config.rope_original_length or config.max_position_embeddings
    return rope


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation {name!r} cannot be converted; allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _heads(config: HybridConfig) -> dict[str, Any]:
    return {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}


def _llama_ours(theirs: Any) -> HybridConfig:
    require(theirs, "hidden_act", "silu")
    require(theirs, "layer_types", None, ["sliding_attention"] * theirs.num_hidden_layers,
            ["full_attention"] * theirs.num_hidden_layers)  # fmt: skip
    return preset(
        "llama",
        num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads,
        sliding_window=getattr(theirs, "sliding_window", None),
        intermediate_size=theirs.intermediate_size,
        max_position_embeddings=theirs.max_position_embeddings,
        attention_bias=bool(getattr(theirs, "attention_bias", False)),
        mlp_bias=bool(getattr(theirs, "mlp_bias", False)),
        norm_eps=theirs.rms_norm_eps,
        **_rope(theirs),
        **shared(theirs),
    )


def _llama_sizes(config: HybridConfig) -> dict[str, Any]:
    return {
        **shared(config),
        **_heads(config),
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _their_rope(config),
    }


def _llama_theirs(config: HybridConfig) -> PreTrainedConfig:
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return LlamaConfig(**_llama_sizes(config), **biases)


def _mistral_theirs(config: HybridConfig) -> PreTrainedConfig:
    return MistralConfig(**_llama_sizes(config), sliding_window=config.layers[0]["sliding_window"])


def _llama_body(config: HybridConfig) -> Places:
    return {
        "model.embed_tokens.weight": Same("model.embed_tokens.weight"),
        "model.norm.weight": Same("model.norm.weight"),
    }


def _llama_layer(config: HybridConfig) -> Places:
    queries, keys = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    inner, names = config.intermediate_size, [f"self_attn.{name}_proj" for name in "qkv"]
    places: Places = {
        "norm.weight": Same("input_layernorm.weight"),
        "mlp_norm.weight": Same("post_attention_layernorm.weight"),
        **affine(_OUT, "self_attn.o_proj", config.attention_bias),
        **affine("mlp.down_proj", "mlp.down_proj", config.mlp_bias),
    }
    for kind in ["weight", *(["bias"] if config.attention_bias else [])]:
        places[f"{_QKV}.{kind}"] = Several([f"{name}.{kind}" for name in names], [queries, keys, keys])
    for kind in ["weight", *(["bias"] if config.mlp_bias else [])]:
        places[f"mlp.gate_up_proj.{kind}"] = Several(
            [f"mlp.{name}_proj.{kind}" for name in ("gate", "up")], [inner] * 2
        )
    return places


def _gpt2_ours(theirs: Any) -> HybridConfig:
    require(theirs, "scale_attn_weights", True)
    require(theirs, "scale_attn_by_inverse_layer_idx", False)
    require(theirs, "add_cross_attention", False)
    return preset(
        "gpt2",
        num_attention_heads=theirs.n_head,
        intermediate_size=theirs.n_inner or 4 * theirs.n_embd,
        max_position_embeddings=theirs.n_positions,
        hidden_act=_activation(theirs.activation_function),
        norm_eps=theirs.layer_norm_epsilon,
        **shared(theirs),
    )


def _gpt2_theirs(config: HybridConfig) -> PreTrainedConfig:
    return GPT2Config(
        **shared(config),
        num_attention_heads=config.num_attention_heads,
        n_inner=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.norm_eps,
    )


def _gpt2_body(config: HybridConfig) -> Places:
    return {
        "model.embed_tokens.weight": Same("transformer.wte.weight"),
        "model.position_table.weight": Same("transformer.wpe.weight"),
        **norm("model.norm", "transformer.ln_f", "layer"),
    }


def _gpt2_layer(config: HybridConfig) -> Places:
    return {
        **norm("norm", "ln_1", "layer"),
        **norm("mlp_norm", "ln_2", "layer"),
        **affine(_QKV, "attn.c_attn", True, turned=True),
        **affine(_OUT, "attn.c_proj", True, turned=True),
        **affine("mlp.up_proj", "mlp.c_fc", True, turned=True),
        **affine("mlp.down_proj", "mlp.c_proj", True, turned=True),
    }


def _bloom_ours(theirs: Any) -> HybridConfig:
    require(theirs, "apply_residual_connection_post_layernorm", False)
    return preset(
        "bloom", num_attention_heads=theirs.n_head, norm_eps=theirs.layer_norm_epsilon, **shared(theirs),
    )  # fmt: skip


def _bloom_theirs(config: HybridConfig) -> PreTrainedConfig:
    return BloomConfig(
        **shared(config), n_head=config.num_attention_heads, layer_norm_epsilon=config.norm_eps,
    )  # fmt: skip


def _bloom_body(config: HybridConfig) -> Places:
    return {
        "model.embed_tokens.weight": Same("transformer.word_embeddings.weight"),
        **norm("model.embedding_norm", "transformer.word_embeddings_layernorm", "layer"),
        **norm("model.norm", "transformer.ln_f", "layer"),
    }


def _bloom_layer(config: HybridConfig) -> Places:
    heads = config.num_attention_heads
    return {
        **norm("norm", "input_layernorm", "layer"),
        **norm("mlp_norm", "post_attention_layernorm", "layer"),
        f"{_QKV}.weight": Interleaved("self_attention.query_key_value.weight", heads, heads),
        f"{_QKV}.bias": Interleaved("self_attention.query_key_value.bias", heads, heads),
        **affine(_OUT, "self_attention.dense", True),
        **affine("mlp.up_proj", "mlp.dense_h_to_4h", True),
        **affine("mlp.down_proj", "mlp.dense_4h_to_h", True),
    }


def _falcon_ours(theirs: Any) -> HybridConfig:
    require(theirs, "alibi", False, None)  # Falcon scales its slopes with the scores
    new, parallel = theirs.new_decoder_architecture, theirs.parallel_attn
    if not new:
        require(theirs, "num_ln_in_parallel_attn", None, 1)
    norms = (theirs.num_ln_in_parallel_attn or 2) if new else 1
    kv_heads = theirs.num_kv_heads if new or not theirs.multi_query else 1
    return preset(
        "falcon",
        block="parallel" if new or parallel else "sequential",
        parallel_norms=norms,
        num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=kv_heads,
        intermediate_size=theirs.ffn_hidden_size,
        hidden_act=_activation(theirs.activation),
        attention_bias=bool(theirs.bias),
        mlp_bias=bool(theirs.bias),
        max_position_embeddings=theirs.max_position_embeddings,
        norm_eps=theirs.layer_norm_epsilon,
        **_rope(theirs),
        **shared(theirs),
    )


def _falcon_theirs(config: HybridConfig) -> PreTrainedConfig:
    sequential, kv_heads, heads = config.block == "sequential", config.num_key_value_heads, config.num_attention_heads
    # The newer form has any number of key heads, but only side by side; the older one has one, or one for each.
    new = not sequential and (config.parallel_norms == 2 or kv_heads not in (1, heads))
    return FalconConfig(
        **shared(config),
        new_decoder_architecture=new,
        num_ln_in_parallel_attn=config.parallel_norms if new else None,
        parallel_attn=not sequential,
        multi_query=kv_heads == 1,
        num_kv_heads=kv_heads,
        num_attention_heads=heads,
        ffn_hidden_size=config.intermediate_size,
        activation=config.hidden_act,
        bias=config.mlp_bias,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_epsilon=config.norm_eps,
        rope_parameters=_their_rope(config),
    )


def _falcon_body(config: HybridConfig) -> Places:
    return {
        "model.embed_tokens.weight": Same("transformer.word_embeddings.weight"),
        **norm("model.norm", "transformer.ln_f", "layer"),
    }


def _falcon_layer(config: HybridConfig) -> Places:
    heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.mlp_bias
    qkv = "self_attention.query_key_value"
    places: Places = {f"{_QKV}.weight": Interleaved(f"{qkv}.weight", heads, kv_heads)}
    places |= {f"{_QKV}.bias": Interleaved(f"{qkv}.bias", heads, kv_heads)} if bias else {}
    places |= affine(_OUT, "self_attention.dense", bias)
    places |= affine("mlp.up_proj", "mlp.dense_h_to_4h", bias) | affine("mlp.down_proj", "mlp.dense_4h_to_h", bias)
    if config.block == "parallel" and config.parallel_norms == 2:
        return places | norm("norm", "ln_attn", "layer") | norm("mlp_norm", "ln_mlp", "layer")
    second = norm("mlp_norm", "post_attention_layernorm", "layer") if config.block == "sequential" else {}
    return places | norm("norm", "input_layernorm", "layer") | second


TRANSFORMERS = {
    "llama": Family(_llama_ours, _llama_theirs, _llama_body, _llama_layer, "model.layers.{}."),
    "mistral": Family(_llama_ours, _mistral_theirs, _llama_body, _llama_layer, "model.layers.{}."),
    "gpt2": Family(_gpt2_ours, _gpt2_theirs, _gpt2_body, _gpt2_layer, "transformer.h.{}."),
    "bloom": Family(_bloom_ours, _bloom_theirs, _bloom_body, _bloom_layer, "transformer.h.{}."),
    "falcon": Family(_falcon_ours, _falcon_theirs, _falcon_body, _falcon_layer, "transformer.h.{}."),
}
