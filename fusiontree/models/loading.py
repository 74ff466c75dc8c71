"""Models from folders that others made: safetensors and JSON only, no remote code."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fusiontree.errors import CheckpointError, FusionTreeError
from fusiontree.models.config import HybridConfig
from fusiontree.models.hybrid_model import HybridLanguageModel
from fusiontree.models.json_files import one_line, read_json
from fusiontree.models.manifest import MANIFEST, verify

MAX_CONFIG_BYTES = 16 * 1024 * 1024
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_LAYERS = 4096


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; an index may only name plain files beside it."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: no {SINGLE} in it; only safetensors weights are read")
    index = read_json(folder / INDEX, MAX_CONFIG_BYTES, CheckpointError)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map from names to files")
    for name in set(names.values()):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX}: {one_line(repr(name), 80)} is not a file in this folder")
    return sorted(folder / name for name in set(names.values()))


def check_model_folder(path: str | Path) -> Path:
    """The folder as a Path when it is a FusionTree checkpoint; CheckpointError otherwise. Reads no weights."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give a model folder with config.json and {SINGLE}")
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES, CheckpointError)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != HybridConfig.model_type:
        raise CheckpointError(
            f"{folder}: config.json has model_type {one_line(repr(kind), 60)}; "
            f"only {HybridConfig.model_type!r} is allowed"
        )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:  # before a list of that length is made
        raise CheckpointError(f"{folder}: {layers} layers are too many; at most {MAX_LAYERS}")
    weight_files(folder)
    return folder


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> HybridLanguageModel:
    """The model of a folder, in evaluation mode; `dtype` None keeps the stored one. CheckpointError when damaged."""
    folder = check_model_folder(path)
    if (folder / MANIFEST).exists():  # a training checkpoint; its optimizer's state is not needed here
        verify(folder, ignore="trainer")
    try:
        config = HybridConfig.from_pretrained(folder, local_files_only=True)
        _check_shapes(folder, config)
        model = HybridLanguageModel.from_pretrained(
            folder, config=config, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
        )
    except FusionTreeError as problem:
        raise CheckpointError(one_line(problem if str(folder) in str(problem) else f"{folder}: {problem}")) from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as problem:
        raise CheckpointError(f"{folder}: the checkpoint cannot be loaded: {one_line(problem)}") from None
    return model.to(device).eval()


def _check_shapes(folder: Path, config: HybridConfig) -> None:
    """Compare the weights' names and shapes with what the config asks for, before anything is allocated."""
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in HybridLanguageModel(config).state_dict().items()}
    stored: dict[str, list[int]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            stored.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    if config.tie_word_embeddings:  # written once, under the embedding's name
        stored.setdefault("lm_head.weight", stored.get("model.embed_tokens.weight", []))
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            asked, found = wanted.get(name, "nothing"), stored.get(name, "nothing")
            raise CheckpointError(f"{folder}: config.json asks for {asked} as {name}, the weights hold {found}")
