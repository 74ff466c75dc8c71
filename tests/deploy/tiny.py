"""Tiny models, a byte-level tokenizer without downloads, and checkpoint folders for the tests of this room."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusiontree import HybridConfig, HybridLanguageModel

VOCAB = 260  # 256 bytes and four special tokens


def tiny_config(**overrides: Any) -> HybridConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 8, "global_heads": 1, "mamba_d_state": 8, "mamba_head_dim": 16,
        "mamba_chunk_size": 8, "gate_rank": 8, "max_position_embeddings": 256, "pad_token_id": 256,
        "bos_token_id": 257, "eos_token_id": 258,
    }  # fmt: skip
    return HybridConfig(**{**settings, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> HybridLanguageModel:
    """A model with weights large enough that its logits differ clearly between tokens."""
    torch.manual_seed(seed)
    model = HybridLanguageModel(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: many characters need several tokens, which is what streaming has to get right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_tiny(folder: Path, model: HybridLanguageModel | None = None, **overrides: Any) -> Path:
    """A model folder with tokenizer."""
    (model or tiny_model(**overrides)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
