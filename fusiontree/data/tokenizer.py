"""Tokenizers: a byte-level BPE trained here, one id per byte, or any by folder or name; and the check with a model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusiontree.data.ahead import alongside
from fusiontree.data.config import SourceConfig, TokenizerConfig
from fusiontree.data.locks import locked
from fusiontree.data.progress import byte_progress
from fusiontree.data.records import Document
from fusiontree.data.sources import expand, read_texts
from fusiontree.errors import ConfigError, DataError

EOS, PAD = "<|endoftext|>", "<|pad|>"
BYTE = "byte"
ORIGIN = "made_by.json"  # beside a run's tokenizer: the settings it was made by
SMALLEST_VOCABULARY = 258
BATCH_BYTES = 2 << 20
TRAINING_BYTES = 200_000_000
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt else '' }}"
)
TokenIds = npt.NDArray[np.uint32]
logger = logging.getLogger(__name__)


def train_tokenizer(
    sources: Sequence[SourceConfig], vocab_size: int, out_dir: str | Path, max_bytes: int = TRAINING_BYTES
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` ids on the first `max_bytes` of the sources and save it in `out_dir`.

    The same text gives the same tokenizer. Raises DataError for unusable text or a folder that is already in use.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size {vocab_size}: must be at least {SMALLEST_VOCABULARY} (256 bytes, end, padding)")
    if not sources:
        raise DataError("no sources to train a tokenizer on")
    folder = _free_folder(Path(out_dir))
    core = _core(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(path.stat().st_size for source in sources for path in expand(source))
    with byte_progress("training the tokenizer", min(total, max_bytes)) as advance:
        core.train_from_iterator(_told(read_texts(sources, max_bytes), advance), trainer)
    tokenizer = _wrap(core)
    if len(tokenizer) < vocab_size:
        logger.warning("the text yields a vocabulary of %d ids only, not %d", len(tokenizer), vocab_size)
    _save(tokenizer, folder, _origin(TokenizerConfig(train_vocab_size=vocab_size), sources))
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte (id = the byte), 256 = end of document, 257 = padding."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    core = _core(models.BPE(vocab=vocabulary, merges=[]))
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (EOS, PAD)])
    return _wrap(core)


def load_tokenizer(path: str | Path, download: bool = False) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder, by hub name from the local Hugging Face cache, or `byte`.

    The network is used only for a hub name with `download`. Raises DataError when it cannot be had or has no end token.
    """
    name = str(path)
    if name == BYTE:
        return byte_tokenizer()
    folder = os.path.expanduser(name)
    local = os.path.isdir(folder)
    if not local and (os.path.exists(folder) or isinstance(path, Path) or name.startswith((".", "/", "~"))):
        raise DataError(f"{name}: not a folder with a tokenizer")
    if download and not local:
        logger.warning("looking for tokenizer %s on the Hugging Face hub", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if local else name, local_files_only=local or not download, trust_remote_code=False
        )
    except Exception as error:  # transformers lets OSError, ValueError, KeyError and bare Exception through here
        raise DataError(_why_not(name, local, download, error)) from error
    return _check(tokenizer, name)


def resolve_tokenizer(
    config: TokenizerConfig, sources: Sequence[SourceConfig], out_dir: str | Path
) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: the one already in `out_dir`, else the one `config` asks for, saved there.

    Safe for several processes at once. Raises ConfigError when the one that is there is not the one asked for.
    """
    folder = Path(out_dir)
    if config.path is None and config.train_vocab_size is None and not _is_there(folder):
        raise ConfigError('tokenizer: give path (a folder, a hub name or "byte") or train_vocab_size')
    if not _is_there(folder):
        with locked(folder):  # several processes start at once: one makes it, the others find it
            if not _is_there(folder):
                return _make(config, sources, folder)
    tokenizer = load_tokenizer(folder)
    _check_origin(tokenizer, config, sources, folder)
    return tokenizer


def _is_there(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists()


def _make(config: TokenizerConfig, sources: Sequence[SourceConfig], folder: Path) -> PreTrainedTokenizerFast:
    if config.path is None:
        assert config.train_vocab_size is not None
        return train_tokenizer(sources, config.train_vocab_size, folder)
    tokenizer = load_tokenizer(config.path, config.download)
    _save(tokenizer, _free_folder(folder), _origin(config, sources))
    return tokenizer


def _check_origin(
    tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig, sources: Sequence[SourceConfig], folder: Path
) -> None:
    """Refuse the tokenizer of an earlier start when the settings now ask for another one."""
    try:
        earlier = (folder / ORIGIN).read_text(encoding="utf-8")
    except FileNotFoundError:  # put there by hand
        return
    same = earlier == _origin(config, sources)
    if not same and config.path is not None:  # under another name it may still be the same
        same = tokenizer_hash(load_tokenizer(config.path, config.download)) == tokenizer_hash(tokenizer)
    if not same:
        raise ConfigError(
            f"data.tokenizer: {folder} holds one made with other settings or text; set them back, or start in a new "
            "system.run_dir"
        )


def _origin(config: TokenizerConfig, sources: Sequence[SourceConfig]) -> str:
    """What decides a run's tokenizer, as JSON."""
    if config.path is not None:
        return json.dumps({"path": config.path})
    texts = [source.model_dump(exclude={"weight", "max_bad_fraction"}) for source in sources]
    return json.dumps({"train_vocab_size": config.train_vocab_size, "sources": texts})


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise DataError when the tokenizer has an id the model's embedding lacks."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise DataError(
            f"tokenizer and model disagree: the tokenizer has ids up to {highest}, the model's vocab_size is "
            f"{vocab_size}; it must be at least {highest + 1}"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that decides which ids a text gets, the same after saving and loading."""
    return _hash(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


@lru_cache(maxsize=4)
def _hash(serialised: str, eos: int) -> str:
    core = Tokenizer.from_str(serialised)
    core.no_padding()
    core.no_truncation()
    return hashlib.sha256(f"{core.to_str()}\0{eos}".encode()).hexdigest()


def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """What turns text into ids here: no padding, no truncation, and the name of a special token is text."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    core.encode_special_tokens = True
    return core


def tokenise(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Document, TokenIds]]:
    """Ids of each document, eos at the end. The name of a special token in the text is text, never the token."""
    core, eos = plain_encoder(tokenizer), tokenizer.eos_token_id

    def encode(batch: list[Document]) -> list[TokenIds]:
        encoded = core.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        return [np.array(array("I", [*encoding.ids, eos])) for encoding in encoded]

    # The encoder's own threads would be idle while Python reads the next documents and writes the last.
    for batch, ids in alongside(encode, _batches(documents)):
        yield from zip(batch, ids, strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _core(model: models.Model) -> Tokenizer:
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",  # batched generation continues at the right end; the loader pads its own rows
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_characters() -> list[str]:
    """The printable character byte-level BPE writes for each byte 0..255 (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    replaced = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(replaced)) for byte in range(256)]


def _told(texts: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        advance(len(text))


def _free_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already there and not an empty folder; name another folder for the tokenizer")
    return folder


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path, origin: str | None = None) -> None:
    """Write beside the target and rename, so that a tokenizer folder is whole or absent."""
    draft = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        tokenizer.save_pretrained(str(draft))
        if origin is not None:
            (draft / ORIGIN).write_text(origin, encoding="utf-8")
        os.replace(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise DataError(f"{folder}: the tokenizer cannot be saved: {error.strerror or error}") from error


def _check(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerFast:
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name}: only tokenizers with a tokenizer.json (fast ones) can be used")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {name}: has no eos token, which ends a document")
    return tokenizer


def _why_not(name: str, local: bool, download: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if local:
        return f"{name}: no tokenizer can be loaded from this folder: {reason}"
    if download:
        return f"tokenizer {name}: neither a folder here nor found on the Hugging Face hub: {reason}"
    return (
        f"tokenizer {name}: neither a folder here nor in the local Hugging Face cache; "
        "name a folder, use byte, train one, or allow tokenizer.download"
    )
