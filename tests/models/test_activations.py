"""What is counted as kept for the backward is what autograd keeps: the distinct memory behind its saved tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.models import HybridLanguageModel, activations
from fusiontree.models.activations import Pass, layer_activations, shared_activations
from tests.models.kinds import MIXED, config_of

# name -> (kind of the contract table, settings): windows shorter than the row, global heads, shared key heads, every
# variant, sequential layers, chunks that do not fill up.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "post": ("post", {}),
    "sandwich, shared keys": ("sandwich", {"num_key_value_heads": 2, "global_heads": 2}),
    "pre, keys for both": ("pre", {"num_key_value_heads": 2, "mamba_dt_limit": (0.0, 1.0)}),
    "only local heads": ("local_only", {}),
    "only global heads": ("global_only", {}),
    "two groups, odd chunk": ("groups", {"mamba_chunk_size": 48}),
    "mixed": ("mixed", {"layers": [{**entry, "sliding_window": entry.get("sliding_window", 32)} for entry in MIXED]}),
    "pyramid": ("post", {"window_growth": 4, "num_hidden_layers": 3}),
    "cross": ("post", {"cross_rank": 8}),
    "gate per head": ("post", {"gate_granularity": "head"}),
    "gate per token": ("post", {"gate_granularity": "token"}),
    "low-rank time": ("srte_low_rank", {}),
    "untied": ("untied", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mamba2": ("mamba2", {}),
    "gpt2": ("gpt2", {}),
    "alibi": ("bloom", {"num_attention_heads": 4, "head_dim": 16}),
    "alibi in windows": ("alibi_windows", {"hidden_act": "gelu"}),
    "falcon": ("falcon", {}),
    "two norms": ("falcon", {"parallel_norms": 2, "norm_placement": "sandwich"}),
    "mamba": ("mamba", {}),
    "sum": ("falcon_h1", {}),
    "mean": ("hymba", {}),
    "sum in the hybrid block": ("post", {"fusion_rule": "sum", "alignment": False}),
    "mean in the hybrid block": ("mean_mamba1", {"mamba_type": "mamba2"}),
    "experts": ("experts", {}),
    "gate without alignment": ("post", {"alignment": False, "norm_placement": "pre"}),
}
SIZES = {"hidden_size": 64, "mamba_head_dim": 16, "mamba_d_state": 16, "gate_rank": 8, "mamba_chunk_size": 32}
ROWS, LENGTH = 2, 160


def built(name: str, device: str = "cpu") -> HybridLanguageModel:
    kind, settings = SHAPES[name]
    whole = ("llama", "mixed", "gpt2", "bloom", "falcon", "falcon_h1")
    windowed = {} if kind in whole else {"sliding_window": 40}
    with torch.device(device):
        return HybridLanguageModel(config_of(kind, **{**SIZES, **windowed, **settings})).train()


@contextmanager
def recorded(model: HybridLanguageModel) -> Iterator[dict[int, Any]]:
    """Storages of what autograd saves, parameters left out, and of what layers are computed again from."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}
    lay_out = model.model._lay_out

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that its address is not given to another
        return t

    def laid_out(*arguments: Any) -> Any:
        positions, segments = lay_out(*arguments)
        again.extend((positions, segments))
        return positions, segments

    again: list[Any] = []
    model.model._lay_out = laid_out  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield kept
    if model.model.gradient_checkpointing:
        positions, segments = again
        for t in (*(positions.rotary or ()), positions.srte, *segments.masks.values()):
            if t is not None:
                keep(t)


def kept_bytes(model: HybridLanguageModel, batch: dict[str, Tensor], checkpointing: str, bf16: bool) -> int:
    model.model.gradient_checkpointing = checkpointing != "none"
    if checkpointing != "none":
        model.config.checkpointing = checkpointing
    with recorded(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(**batch, labels=batch["input_ids"], skip_logits=True, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def counted_bytes(model: HybridLanguageModel, run: Pass, checkpointing: str) -> int:
    config = model.config
    layers = [layer_activations(config, spec, run).kept(checkpointing, watched=False) for spec in config.layer_specs]
    return sum(layers) + sum(shared_activations(config, run, checkpointing != "none").values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_counted_is_what_autograd_keeps(name: str, bf16: bool) -> None:
    model = built(name)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(LENGTH) % 70).expand(ROWS, LENGTH).contiguous()
    for packed in (True, False):
        batch = {"input_ids": ids, **({"position_ids": documents} if packed else {})}
        run = Pass(ROWS, LENGTH, 2 if bf16 else 4, packed, "cpu")
        for checkpointing in ("none", "branches", "block"):
            found = kept_bytes(model, batch, checkpointing, bf16)
            assert counted_bytes(model, run, checkpointing) == pytest.approx(found, rel=0.05), (packed, checkpointing)


def test_masks_of_long_packed_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the mask budget heads that see everything go block by block; shared keys are copied once."""
    monkeypatch.setattr(sys.modules["fusiontree.ops.attention"], "_BLOCK_BUDGET", 64 * LENGTH)
    model = built("sandwich, shared keys")
    documents = (torch.arange(LENGTH) % 70).expand(ROWS, LENGTH).contiguous()
    batch = {"input_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long), "position_ids": documents}
    found = kept_bytes(model, batch, "none", bf16=False)
    assert counted_bytes(model, Pass(ROWS, LENGTH, 4, True, "cpu"), "none") == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", ["post", "sandwich, shared keys", "only global heads", "llama", "mistral", "mamba2"])
def test_a_gpu_keeps_what_its_kernels_keep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory and without a GPU: the attention kernels a GPU would run are called by name. (Their norm is not to
    be had here, so that it is counted as a CPU's.)"""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, 0.0, is_causal)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(activations, "_rms_norm", lambda size, run: 4 * (2 * size + 1))
    model = built(name, "meta")
    batch = {"input_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")}
    for checkpointing in ("none", "branches", "block"):
        found = kept_bytes(model, batch, checkpointing, bf16=False)
        counted = counted_bytes(model, Pass(ROWS, LENGTH, 4, False, "cuda"), checkpointing)
        assert counted == pytest.approx(found, rel=0.05), checkpointing
