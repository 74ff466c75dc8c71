"""Builds a loader: opens the sources of a split, divides them, checks the sizes."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from fusiontree.data.config import DataConfig, SourceConfig
from fusiontree.data.loader import Loader, Shape
from fusiontree.data.prepare import open_source
from fusiontree.data.splits import Split, all_pieces, hold_out
from fusiontree.errors import ConfigError, DataError


def build_loader(
    data_config: DataConfig, tokenizer: PreTrainedTokenizerFast, split: Split, sequence_length: int, batch_size: int,
    seed: int = 0, rank: int = 0, world_size: int = 1,
) -> Loader:  # fmt: skip
    """Loader of a split; text that has not been seen before is tokenised first, with progress.

    `data_config.seed`, when given, takes the place of `seed`. Raises DataError for unusable data, ConfigError for
    impossible sizes.
    """
    shape = Shape(sequence_length, batch_size, rank, world_size)
    shape.check()
    sources, fraction = _sources(data_config, split)
    stores = [open_source(source, tokenizer, data_config.cache_dir) for source in sources]
    pieces = [
        all_pieces(store) if fraction is None else hold_out(store, fraction, split, source.path)
        for source, store in zip(sources, stores, strict=True)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chosen_seed = seed if data_config.seed is None else data_config.seed
    return Loader(stores, pieces, data_config, split, shape, pad=pad, seed=chosen_seed)


def _sources(config: DataConfig, split: Split) -> tuple[list[SourceConfig], float | None]:
    """Sources of a split, and the fraction of them to hold out (None: they are used whole)."""
    if split not in ("train", "validation"):
        raise ConfigError(f"split {split!r}: must be train or validation")
    if split == "validation" and config.validation:
        return config.validation, None
    if not config.train:
        raise DataError(f"data.{split}: no sources")
    if config.validation:
        return config.train, None
    if split == "validation" and config.validation_fraction == 0:
        raise DataError("data.validation: no sources and validation_fraction is 0; give one of the two")
    return config.train, config.validation_fraction
