"""A short name for a model's weights and layers, so that a plan, session or result of another model is noticed."""

import hashlib
import json
from typing import Any

import torch

SAMPLES_PER_TENSOR = 256


def model_fingerprint(model: Any) -> str:
    """Hash of the layer list and of names, shapes and up to 256 evenly spaced values of every parameter.

    Values are compared in bfloat16, so that the same checkpoint loaded in fp32 or bf16 has the same fingerprint. Any
    Hugging Face model will do; of one that is not ours the model type stands for the layer list.
    """
    layers = getattr(model.config, "layers", None) or model.config.model_type
    digest = hashlib.sha256(json.dumps(layers, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_sample(parameter.detach()).numpy().tobytes())
    return "sha256:" + digest.hexdigest()[:32]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
    return flat[::stride][:SAMPLES_PER_TENSOR].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
