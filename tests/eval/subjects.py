"""Tiny random models with a tokenizer: one of ours and one of transformers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusiontree import HybridLanguageModel
from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.eval.subject import Subject
from fusiontree.models.presets import preset

VOCABULARY = 258  # bytes, end, padding
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def hybrid(length: int = 256) -> HybridLanguageModel:
    torch.manual_seed(0)
    model = HybridLanguageModel(
        preset("fusiontree", **SIZES, mamba_head_dim=16, mamba_d_state=8, sliding_window=8, gate_rank=4,
               max_position_embeddings=length)
    )  # fmt: skip
    return sharpened(model)


def llama(length: int = 256, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    config = LlamaConfig(**SIZES, **ends, intermediate_size=48, max_position_embeddings=length, **settings)
    return sharpened(LlamaForCausalLM(config).float())


def sharpened(model):
    """Larger weights: a random model of this size otherwise finds all tokens equally likely and repeats one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def subject(kind: str = "hybrid", length: int = 256, **settings) -> Subject:
    made = {"hybrid": hybrid, "llama": llama}[kind](length)
    return Subject(made, byte_tokenizer(), **settings)
