"""The rows of the contract table: every kind of layer as a tiny config, and models of it with weights large enough
that an error shows."""

import functools
from typing import Any

import torch
from torch import Tensor

from fusiontree.models import HybridConfig, HybridLanguageModel, preset

VOCAB = 61
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "sliding_window": 5,
    "global_heads": 1,
    "mamba_d_state": 8,
    "mamba_head_dim": 8,
    "mamba_chunk_size": 8,
    "gate_rank": 4,
    "max_position_embeddings": 256,
    "srte_rank": 8,
}
GRANULARITIES = ("channel", "head", "token", "layer")
PRUNED = [{"mixers": ["attention"]}, {"mixers": ["mamba"]}]
MIXED = [
    {},
    {"block": "sequential", "mixers": ["attention"], "sliding_window": 9, "global_heads": 0},
    {"block": "sequential", "mixers": ["mamba"]},
    {"mixers": ["attention"], "sliding_window": None},
    {"mixers": ["mamba"]},
]
KINDS: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm_placement": "pre", "srte": "none", "mamba_dt_limit": (0.05, 1.0)},
    "sandwich": {"norm_placement": "sandwich", "mlp_type": "swiglu"},
    "gqa_shared": {"num_key_value_heads": 2, "global_heads": 1},  # a key head serves a global and a local head
    "mqa": {"num_key_value_heads": 1, "global_heads": 2},
    "local_only": {"num_key_value_heads": 2, "global_heads": 0},
    "global_only": {"num_key_value_heads": 2, "global_heads": 4},
    "window_1": {"sliding_window": 1},
    "window_odd": {"sliding_window": 37, "num_key_value_heads": 2},
    "window_wide": {"sliding_window": 300},
    "attention_kept": {"layers": [{"mixers": ["attention"]}] * 2},
    "mamba_kept": {"layers": [{"mixers": ["mamba"]}] * 2},
    "pruned": {"layers": PRUNED, "norm_placement": "pre"},
    "llama": {"preset": "llama", "num_key_value_heads": 2},
    "mistral": {"preset": "llama", "num_key_value_heads": 1, "sliding_window": 7},
    "mamba2": {"preset": "mamba2"},
    "srte_learned": {"srte": "learned"},
    "srte_low_rank": {"srte": "low_rank"},
    "srte_per_layer": {"srte": "learned", "srte_shared": False},
    "groups": {"mamba_n_groups": 2, "mamba_chunk_size": 7},
    "conv_1": {"mamba_d_conv": 1},
    "conv_2": {"mamba_d_conv": 2, "mamba_expand": 1.5, "sliding_window": 2},
    "mixed": {"layers": MIXED, "num_hidden_layers": 5, "norm_placement": "pre"},
    "pyramid": {"window_growth": 4, "sliding_window": 3, "num_hidden_layers": 3},
    "cross": {"cross_rank": 3},
    "cross_pruned": {"cross_rank": 3, "layers": [{}, *PRUNED], "num_hidden_layers": 3},
    "gate_head": {"gate_granularity": "head", "norm_placement": "sandwich"},
    "gate_token": {"gate_granularity": "token", "cross_rank": 2},
    "gate_layer": {"gate_granularity": "layer", "norm_placement": "pre"},
    "gpt2": {"preset": "gpt2"},
    "bloom": {"preset": "bloom", "num_attention_heads": 6, "head_dim": 6, "hidden_size": 36},  # slopes for any count
    "falcon": {"preset": "falcon", "num_attention_heads": 4},
    "alibi_windows": {  # a key head serves a global and a local head, each group with slopes of its own
        "preset": "llama",
        "position_encoding": "alibi",
        "sliding_window": 7,
        "global_heads": 1,
        "num_key_value_heads": 2,
        "norm_placement": "post",
        "mlp_type": "mlp",
        "hidden_act": "relu",
    },
    "global_none": {  # local heads turn their keys, the global one does not, of the same key head
        "global_position_encoding": "none",
        "num_key_value_heads": 2,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 16,
        "mlp_type": "geglu",
        "norm_type": "layer",
        "mlp_bias": True,
        "attention_bias": True,
        "alignment": False,
    },
    "parallel_2": {
        "block": "parallel",
        "mixers": ["mamba"],
        "parallel_norms": 2,
        "norm_placement": "sandwich",
        "position_encoding": "learned",
        "embedding_norm": True,
    },
    "mamba": {"preset": "mamba"},
    "falcon_h1": {"preset": "falcon_h1_like", "norm_placement": "sandwich"},
    "hymba": {"preset": "hymba_like", "sliding_window": 5, "num_hidden_layers": 4},
    "mean_mamba1": {
        "fusion_rule": "mean",
        "norm_type": "layer",
        "mamba_type": "mamba1",
        "mamba_d_conv": 3,
        "mamba_dt_rank": 5,
        "mamba_dt_limit": (0.05, 1.0),
    },
    "experts": {
        "num_experts": 4,
        "experts_per_token": 2,
        "mlp_type": "swiglu",
        "norm_placement": "pre",
        "srte": "none",
        "fusion_rule": "sum",
        "alignment": False,
        "cross_rank": 2,
    },
    "untied": {"tie_word_embeddings": False, "mlp_type": "none"},
}


def config_of(kind: str, **overrides: Any) -> HybridConfig:
    settings = {**BASE, **KINDS[kind], **overrides}
    name = settings.pop("preset", None)
    if name is None:
        return HybridConfig(**settings)
    for key in ("sliding_window", "global_heads"):
        if key not in KINDS[kind]:
            settings.pop(key)
    return preset(name, **settings)


def draw_weights(model: torch.nn.Module, seed: int = 1) -> None:
    """Large random weights everywhere, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("norm" in name and not name.endswith("bias")) or name.endswith((".D", "scale")):
                parameter.normal_(1.0, 0.2, generator=generator)
            elif name.endswith(("dt_bias", "A_log")):
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)


def build(kind: str, **overrides: Any) -> HybridLanguageModel:
    """A fresh model of a kind."""
    model = HybridLanguageModel(config_of(kind, **overrides))
    draw_weights(model)
    return model.eval()


shared_model = functools.lru_cache(build)  # for tests that leave the model as it is


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def off(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinite."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    difference = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
    return float("inf") if difference.isnan() else difference.item()


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert off(got, want) <= tolerance, f"off by {off(got, want):.2e}, allowed {tolerance:.0e}"


def assert_same_gradient(got: Tensor, want: Tensor, upstream: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest value of the gradient or of what came from above: a gradient may be exactly zero."""
    scale = max(want.abs().max().item(), upstream.abs().max().item())
    assert (got.double() - want.double()).abs().max().item() <= tolerance * scale


def gradients(model: HybridLanguageModel, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; None where it has no part."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Per parameter, relative to its own largest gradient, or 3% of the model's where that is more."""
    assert got.keys() == want.keys()
    largest = max(g.abs().max().item() for g in want.values())
    for name, g in want.items():
        scale = max(g.abs().max().item(), 3e-2 * largest)
        error = (got[name] - g).abs().max().item() / scale
        assert error <= tolerance, f"{name}: gradient off by {error:.2e}, allowed {tolerance:.0e}"
