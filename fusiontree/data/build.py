"""Builds a loader: opens the sources of a split, divides them, adds what is synthetic, checks the sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from fusiontree.data.config import DataConfig, SourceConfig
from fusiontree.data.hub import stream_fingerprint
from fusiontree.data.loader import VALIDATION_ORDER, Facts, Loader, Shape
from fusiontree.data.prepare import open_source
from fusiontree.data.records import BadRecords
from fusiontree.data.rows import PackedRows, Reader, SingleRows, StoredRows
from fusiontree.data.shuffle import make_key
from fusiontree.data.splits import Pieces, Split, all_pieces, hold_out
from fusiontree.data.store import TokenStore
from fusiontree.data.streaming import StreamRows, TextStream
from fusiontree.data.synthetic import RealText, SyntheticRows
from fusiontree.data.tokenizer import plain_encoder
from fusiontree.errors import ConfigError, DataError


def build_loader(
    data_config: DataConfig, tokenizer: PreTrainedTokenizerFast, split: Split, sequence_length: int, batch_size: int,
    seed: int = 0, rank: int = 0, world_size: int = 1, longest: int | None = None,
) -> Loader:  # fmt: skip
    """Loader of a split; text that has not been seen before is tokenised first, with progress.

    `longest`: the largest length that `Loader.resize` will ask for; none: `sequence_length`.
    `data_config.seed`, when given, takes the place of `seed`. Raises DataError for unusable data, ConfigError for
    impossible sizes.
    """
    shape = Shape(sequence_length, batch_size, rank, world_size)
    shape.check()
    length = longest or sequence_length
    if length % sequence_length or (length > sequence_length and not data_config.packing):
        raise ConfigError(f"sequence_length {sequence_length}: must divide {length}, and needs packing")
    sources, fraction = _sources(data_config, split)
    chosen_seed = seed if data_config.seed is None else data_config.seed
    order = chosen_seed if split == "train" else VALIDATION_ORDER
    readers: list[Reader] = []
    held: list[_Held] = []
    for number, source in enumerate(sources):
        key = make_key(order, number)
        if source.mode == "streaming":
            readers.append(_stream(source, tokenizer, length, key))
            continue
        store = open_source(source, tokenizer, data_config.cache_dir)
        pieces = all_pieces(store) if fraction is None else hold_out(store, fraction, split, source.path)
        held.append(_Held(store, pieces))
        kind = PackedRows if data_config.packing else SingleRows
        readers.append(StoredRows(store, kind(pieces, length, key)))
    weights = [source.weight for source in sources if source.weight is not None] if split == "train" else []
    facts = _facts(held, sources, weights, data_config, split)
    if split == "train" and data_config.synthetic is not None:
        share = data_config.synthetic.probability
        if len(readers) > sum(isinstance(reader, StoredRows) for reader in readers):
            weights = weights or [1.0]  # a single stream needs none among real sources
        readers.append(_synthetic(readers, data_config, tokenizer, length, make_key(order, len(readers))))
        weights = [*(weight / sum(weights) * (1 - share) for weight in weights), share] if weights else []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Loader(readers, weights or None, data_config, split, shape, length, facts, pad=pad, seed=chosen_seed)


class _Held(NamedTuple):
    """A store and the part of it that a split uses."""

    store: TokenStore
    pieces: Pieces


def _stream(source: SourceConfig, tokenizer: PreTrainedTokenizerFast, length: int, key: int) -> StreamRows:
    core = plain_encoder(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]

    return StreamRows(TextStream(source, key), encode, tokenizer.eos_token_id, length)


def _synthetic(
    readers: list[Reader], config: DataConfig, tokenizer: PreTrainedTokenizerFast, length: int, key: int
) -> SyntheticRows:
    """As many rows that they are the wanted share of all (with streams the weights see to that)."""
    assert config.synthetic is not None
    core, share = plain_encoder(tokenizer), config.synthetic.probability
    real = [reader for reader in readers if isinstance(reader, StoredRows)]
    count = max(1, round(sum(reader.count for reader in real) * share / (1 - share)))
    eos = tokenizer.eos_token_id
    return SyntheticRows(
        config.synthetic.tasks, count, length, key, packing=config.packing, eos=eos,
        encode=lambda text: list(core.encode(text, add_special_tokens=False).ids),
        haystack=RealText(real, lambda ids: core.decode(ids, skip_special_tokens=False), eos),
    )  # fmt: skip


def _facts(
    held: list[_Held], sources: list[SourceConfig], weights: Sequence[float], config: DataConfig, split: Split
) -> Facts:
    """The fingerprint is over what the sources say of themselves, the weights, the held-out part and the synthetic."""
    named: list[object] = [[part.store.fingerprint for part in held], weights]
    if streams := [stream_fingerprint(source) for source in sources if source.mode == "streaming"]:
        named.append({"streams": streams, "modes": [source.mode for source in sources]})
    if split == "train" and config.synthetic is not None:
        named.append(config.synthetic.model_dump())
    digest = hashlib.sha256(json.dumps(named).encode())
    bad = BadRecords()
    for store, pieces in held:
        digest.update(pieces.begins.tobytes())
        digest.update(pieces.lengths.tobytes())
        bad.merge(store.bad_records)
    return Facts(digest.hexdigest(), sum(int(part.pieces.lengths.sum()) for part in held), bad)


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
    if split == "train":
        return config.train, config.validation_fraction
    finite = [source for source in config.train if source.mode != "streaming"]
    if not finite:
        raise DataError("data.validation: nothing is held out of streaming sources; name sources of its own")
    return finite, config.validation_fraction
