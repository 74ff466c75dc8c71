"""Model folders of transformers' other model types as ours, and back."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from fusiontree.deploy.files import new_folder, write_json
from fusiontree.deploy.loading import copy_tokenizer_files
from fusiontree.errors import CheckpointError, ConfigError, FusionTreeError
from fusiontree.models.config import HybridConfig
from fusiontree.models.convert import FAMILIES, from_transformers, to_transformers
from fusiontree.models.json_files import one_line, read_json
from fusiontree.models.loading import MAX_CONFIG_BYTES, load_model, weight_files

CONVERSION_MARK = "conversion.json"
TOLERANCE = 1e-4


def convert_model(source: str | Path, target: str | Path, to: str | None = None) -> str:
    """Write the model folder `source` as model type `to` to the new folder `target`, tokenizer included; returns `to`.

    `to` None: FusionTree's own. The folder appears when its logits on random tokens equal those of the source to a
    relative error of 1e-4. CheckpointError for what is no such folder, ConfigError for forms that have no counterpart.
    """
    folder, output = Path(source), Path(target)
    kind = model_type(folder)
    own = HybridConfig.model_type
    if to is None and kind == own:
        raise ConfigError(f"{folder}: is FusionTree's already; say what it is to become: {', '.join(FAMILIES)}")
    to = to or own
    if (kind == own) == (to == own):
        raise ConfigError(f"{folder}: a {kind} model becomes {own} first, and that a {to}")
    original = load_model(folder) if kind == own else _load(folder)
    converted = to_transformers(original, to) if kind == own else from_transformers(original)
    error = _difference(original, converted)
    if not error <= TOLERANCE:  # also catches NaN
        raise CheckpointError(f"{folder}: logits as {to} are off by {error:.1e}, at most {TOLERANCE:.0e} is allowed")
    with new_folder(output, CONVERSION_MARK, CheckpointError) as written:
        converted.save_pretrained(written)
        copy_tokenizer_files(folder, written)
        record = {"format": "fusiontree-conversion", "version": 1, "from": kind, "to": to, "relative_error": error}
        write_json(written / CONVERSION_MARK, record, CheckpointError)
    return to


def model_type(folder: Path) -> str:
    """Of a model folder: FusionTree's, or one of those that can be converted."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give a model folder with config.json and weights")
    content = read_json(folder / "config.json", MAX_CONFIG_BYTES, CheckpointError)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != HybridConfig.model_type and kind not in FAMILIES:
        raise CheckpointError(
            f"{folder}: config.json has model_type {one_line(repr(kind), 60)}; there are {', '.join(FAMILIES)}"
        )
    return str(kind)


def _load(folder: Path) -> Any:
    """A model of transformers, from safetensors and without code of its own."""
    weight_files(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
    except FusionTreeError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as problem:
        raise CheckpointError(f"{folder}: the checkpoint cannot be loaded: {one_line(problem)}") from None


@torch.no_grad()
def _difference(one: Any, other: Any) -> float:
    """Largest difference of the logits on random tokens in fp32, relative to the largest."""
    length = min(32, getattr(one.config, "max_position_embeddings", 32))
    tokens = torch.randint(one.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", enabled=False):
        want, got = (model(tokens, use_cache=False).logits.float() for model in (one, other))
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
