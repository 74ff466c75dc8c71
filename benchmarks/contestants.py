"""FusionTree and two models of transformers at equal parameter count, all from one set of sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import yaml
from transformers import FalconH1Config, FalconH1ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fusiontree import HybridConfig, HybridLanguageModel
from fusiontree.models.presets import preset

TOLERANCE = 0.02  # the parameter counts of a comparison lie within 2% of ours
NAMES = ("fusiontree", "falcon_h1", "llama")


@dataclass(frozen=True)
class Sizes:
    """What the three share. Attention heads are 64 wide; Falcon-H1 has our SSM sizes and key heads."""

    hidden_size: int = 512
    num_layers: int = 6
    vocab_size: int = 8192
    d_state: int = 64
    max_length: int = 4096
    chunk_size: int = 64  # Falcon-H1's own default, 256, is slower on CPU (see README)
    mlp_multiple: int = 32  # inner sizes that matrix units like
    overrides: dict[str, Any] = field(default_factory=dict)  # settings of our preset; Falcon-H1 follows its SSM sizes

    @property
    def heads(self) -> int:
        return self.hidden_size // 64


QUICK = Sizes(hidden_size=128, num_layers=2, vocab_size=512, mlp_multiple=8)


def sizes_from(options: argparse.Namespace) -> Sizes:
    """The sizes that the command line asks for: `--quick` ones or the standard ones, with `--set KEY=VALUE`."""
    pairs = (text.partition("=") for text in options.set)
    overrides = {key: yaml.safe_load(value) for key, _, value in pairs}
    chunk = {"chunk_size": options.falcon_chunk} if "falcon_chunk" in options else {}
    return replace(QUICK if options.quick else Sizes(), overrides=overrides, **chunk)


def our_config(sizes: Sizes, **overrides: Any) -> HybridConfig:
    """The FusionTree preset, slim where its defaults are broad, so that six layers come to about 29 M parameters."""
    settings = {
        "mamba_expand": 1.0,
        "num_key_value_heads": max(1, sizes.heads // 4),
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.heads,
        "mamba_d_state": sizes.d_state,
        "max_position_embeddings": sizes.max_length,
    }
    return preset("fusiontree", **(settings | sizes.overrides | overrides))


def _ours(sizes: Sizes, _: int) -> PreTrainedModel:
    return HybridLanguageModel(our_config(sizes))


def _llama(sizes: Sizes, intermediate_size: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.max_length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _falcon_h1(sizes: Sizes, intermediate_size: int) -> PreTrainedModel:
    ours = our_config(sizes)
    config = FalconH1Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=ours.num_key_value_heads,
        mamba_d_ssm=ours.mamba_inner_size,
        mamba_n_heads=ours.mamba_num_heads,
        mamba_d_head=ours.mamba_head_dim,
        mamba_d_state=ours.mamba_d_state,
        mamba_chunk_size=sizes.chunk_size,
        max_position_embeddings=sizes.max_length,
        tie_word_embeddings=True,
    )
    return FalconH1ForCausalLM(config)


BUILDERS: dict[str, Callable[[Sizes, int], PreTrainedModel]] = {
    "fusiontree": _ours,
    "falcon_h1": _falcon_h1,
    "llama": _llama,
}


def count(model: torch.nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _count_on_meta(name: str, sizes: Sizes, intermediate_size: int) -> int:
    with torch.device("meta"):
        return count(BUILDERS[name](sizes, intermediate_size))


def matching_intermediate_size(name: str, sizes: Sizes, target: int) -> int:
    """The MLP size that brings model `name` nearest to `target` parameters, which grow linearly with it."""
    one, two = (_count_on_meta(name, sizes, sizes.mlp_multiple * times) for times in (1, 2))
    return sizes.mlp_multiple * max(1, 1 + round((target - one) / (two - one)))


def build(names: tuple[str, ...], sizes: Sizes, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
    """The named models with fresh weights. Raises SystemExit when their sizes cannot be matched within 2%."""
    target = _count_on_meta("fusiontree", sizes, 0)
    models = {}
    for name in names:
        width = 0 if name == "fusiontree" else matching_intermediate_size(name, sizes, target)
        torch.manual_seed(0)
        models[name] = BUILDERS[name](sizes, width).to(dtype)
        share = count(models[name]) / target
        detail = f"intermediate_size {width}" if width else "preset"
        print(f"{name:12s} {count(models[name]):>12,} parameters ({share - 1:+.2%} of ours; {detail})", flush=True)
        if abs(share - 1) > TOLERANCE:
            raise SystemExit(f"{name}: no MLP size brings it within {TOLERANCE:.0%} of {target:,} parameters")
    return models


def as_settings(sizes: Sizes, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """What a result file says about the contestants."""
    widths = {name: getattr(model.config, "intermediate_size", None) for name, model in models.items()}
    return asdict(sizes) | {"parameters": {n: count(m) for n, m in models.items()}, "intermediate_size": widths}
