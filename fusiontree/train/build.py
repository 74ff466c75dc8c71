"""Turn a RunConfig into the parts of a run: device, model, callbacks."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fusiontree.data import check_vocabulary, load_tokenizer, tokenizer_hash
from fusiontree.errors import ConfigError, FusionTreeError
from fusiontree.models import HybridConfig, HybridLanguageModel
from fusiontree.models.loading import load_model
from fusiontree.train.callbacks import Callback, Console, MetricsFile, StateFile, TensorBoard, WandB
from fusiontree.train.checkpoint import RunLock
from fusiontree.train.config import RunConfig
from fusiontree.train.gate_monitor import GateMonitor
from fusiontree.train.jsonl import JsonLines
from fusiontree.train.ranks import Ranks


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one; raises ConfigError when cuda is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("system.device: cuda is asked for, but torch sees no GPU; allowed here: auto, cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def run_folder(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Make the run folder and keep other runs out of it.

    Raises ConfigError before any work when it cannot be written. When the input turns out to be unusable before the run
    begins (which writes config.yaml), a folder that was new is removed again.
    """
    with ExitStack() as held:

        def take() -> bool:
            new = _prepare(run_dir)
            held.enter_context(RunLock(run_dir))
            return new

        new = ranks.on_first(take)
        try:
            yield
        except FusionTreeError:
            if new and ranks.first and not (run_dir / "config.yaml").exists():
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


def _prepare(run_dir: Path) -> bool:
    """Make the folder and try to write in it; whether nothing was in it before."""
    probe = run_dir / "checkpoints" / "writable.tmp"
    try:
        new = not run_dir.exists() or not any(run_dir.iterdir())
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"system.run_dir: {run_dir} cannot be written: {error.strerror or error}") from error
    return new


def seed_everything(seed: int) -> None:
    """Python's and torch's generators, on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, far apart for neighbours."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def model_config(config: RunConfig, tokenizer: Any | None = None) -> HybridConfig:
    """HybridConfig of the run; the vocabulary and special ids come from the tokenizer where the section is silent."""
    section: dict[str, Any] = {}
    if tokenizer is not None:
        section["vocab_size"] = max(tokenizer.get_vocab().values()) + 1
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            section[name] = getattr(tokenizer, name)
    length = config.training.longest
    section["max_position_embeddings"] = max(length, HybridConfig.max_position_embeddings)
    section.update(config.model)
    if "vocab_size" not in section:
        raise ConfigError("model.vocab_size: is required where there is no tokenizer to take it from")
    return HybridConfig(**section)


def build_model(config: RunConfig, tokenizer: Any | None = None) -> HybridLanguageModel:
    """A fresh model from the run's seed; under `torch.device("meta")` it has shapes but no weights."""
    seed_everything(config.system.seed)
    return HybridLanguageModel(model_config(config, tokenizer))


def prepare_model(model: HybridLanguageModel, config: RunConfig, tokenizer: Any) -> None:
    """Check the vocabulary and keep the weights in fp32."""
    model.float()
    check_vocabulary(tokenizer, model.config.vocab_size)


def set_checkpointing(model: HybridLanguageModel, mode: str) -> None:
    """What is computed again in the backward pass from now on: none, branches or block."""
    # The flag itself: the methods that set it were renamed between transformers 5.17 and 5.23.
    model.model.gradient_checkpointing = mode != "none"
    if mode != "none":
        model.config.checkpointing = mode


def build_callbacks(
    config: RunConfig, run_dir: Path, tokenizer: Any, console: Console, first: bool = True
) -> list[Callback]:
    """The callbacks the settings ask for, the console last so that its bar is below what others say.

    Of several processes only the `first` writes; the others keep what decides how the model is asked.
    """
    callbacks: list[Callback] = []
    if config.gate_monitor.enabled:
        file = JsonLines(run_dir / "gates.jsonl", writes=first)
        callbacks.append(GateMonitor(config.gate_monitor, config.training.steps, file, tokenizer))
    if not first:
        return callbacks
    callbacks[:0] = [StateFile(run_dir / "state.json"), MetricsFile(JsonLines(run_dir / "metrics.jsonl"))]
    if config.logging.tensorboard:
        _require("tensorboard", "logging.tensorboard")
        callbacks.append(TensorBoard(run_dir / "tensorboard"))
    if config.logging.wandb:
        _require("wandb", "logging.wandb")
        callbacks.append(WandB(config.logging.wandb_project, run_dir, config.model_dump(mode="json")))
    return [*callbacks, console]


def load_teacher(path: str, tokenizer: Any) -> HybridLanguageModel:
    """The model to learn from; raises ConfigError when the folder holds none, or one with another tokenizer."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"training.teacher: {path} is not a model folder: config.json is missing")
    try:
        own = tokenizer_hash(load_tokenizer(folder))
        teacher = load_model(folder)
    except FusionTreeError as error:
        raise ConfigError(f"training.teacher: {error}") from error
    if own != tokenizer_hash(tokenizer):
        raise ConfigError(
            f"training.teacher: {path} has another tokenizer than the run; their tokens cannot be compared"
        )
    return teacher


def _require(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting}: the package {package} is not installed; install it or set {setting}=false")
