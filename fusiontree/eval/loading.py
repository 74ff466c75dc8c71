"""A causal language model from a folder or the hub: safetensors only, and no code from there unless it is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fusiontree.models.hybrid_model  # noqa: F401  makes our models known to the Auto classes
from fusiontree.errors import CheckpointError
from fusiontree.eval.subject import Subject

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_subject(
    place: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> Subject:
    """The model of a folder, or of a name on the Hugging Face hub, with its tokenizer (`tokenizer`: from elsewhere).

    `device` None takes the GPU when there is one, `dtype` None the stored one. CheckpointError in one line for what
    cannot be loaded, has weights missing, or has no tokenizer.
    """
    name = str(place)
    _check(name)
    words = load_tokenizer(str(tokenizer or place), trust_remote_code)
    model = load_causal_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return Subject(model, words, max_length=max_length, batch_size=batch_size, name=name)


def load_causal_model(
    place: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model alone, in evaluation mode, as `load_subject` takes it."""
    name = str(place)
    model = _model(name, _check(name), dtype, trust_remote_code)
    return model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))).eval()


def _check(name: str) -> bool:
    """Whether it is a folder here, which is then one that can be read."""
    local = _is_local(name)
    if local:
        _check_folder(Path(name))
    return local


def _is_local(name: str) -> bool:
    if Path(name).is_dir():
        return True
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: not a model folder")
    return False


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder: there is no config.json in it")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: there are no safetensors weights in it; other formats are not read")


def _model(name: str, local: bool, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    where: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **where
        )
    except Exception as error:  # the hub, transformers and safetensors raise nearly every kind there is
        raise CheckpointError(f"{name}: {_why(local, error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = sorted(map(str, report[kind]))[0]
            raise CheckpointError(f"{name}: {len(report[kind])} weights do not fit the config, such as {first}")
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or of a name on the hub; CheckpointError when there is none."""
    local = _is_local(name)
    if local and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(f"{name}: has no tokenizer (tokenizer.json); name one with --tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for malformed files
        raise CheckpointError(f"{name}: no tokenizer can be loaded: {_why(local, error)}") from error


def _why(local: bool, error: Exception) -> str:
    """The first line of what went wrong."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = text if len(text) <= 200 else text[:199] + "…"
    return f"cannot be loaded: {reason}" if local else f"neither a folder here nor to be had from the hub: {reason}"
