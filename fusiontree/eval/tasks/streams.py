"""Text files as streams of tokens whose bytes are known, for measures of how well text is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusiontree.data import SourceConfig, read_texts
from fusiontree.data.tokenizer import plain_encoder
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.subject import Subject
from fusiontree.eval.task import TaskSettings
from fusiontree.eval.tasks.options import one_of

LARGEST_DOCUMENT = 1 << 30


@dataclass(frozen=True)
class Stream:
    """Tokens that follow each other.

    ids (N,); byte_ends (N,): UTF-8 bytes of all text up to the end of each token; is_text (N,): False for what divides
    two documents, which has no bytes.
    """

    ids: npt.NDArray[np.int64]
    byte_ends: npt.NDArray[np.int64]
    is_text: npt.NDArray[np.bool_]


def read_streams(
    subject: Subject, settings: TaskSettings, lengths: tuple[int, ...], enough: int | None
) -> list[Stream]:
    """The text of `settings.data` (file, glob or `stdlib`): one stream, or with documents=apart one per document.

    Documents apart count when they are longer than the shortest of `lengths`, and the longest one in any case. Reading
    ends when there are `enough` tokens to measure the longest of `lengths`. DataError when there is no text.
    """
    joined = one_of(settings, "documents", ("joined", "apart")) == "joined"
    documents = _documents(subject, settings)
    streams = [_joined(documents, enough)] if joined else _apart(documents, lengths, enough)
    if not streams[0].ids.size:
        raise DataError(f"{settings.data}: the tokenizer finds no token in it")
    return streams


def _documents(subject: Subject, settings: TaskSettings) -> Iterator[Stream]:
    """One stream per document, what divides it from the next at its end."""
    if settings.data is None:
        raise ConfigError("perplexity: --data: give a text file, a JSONL file, a glob, or stdlib")
    if not subject.tokenizer.is_fast:
        raise DataError(f"{subject.name}: only tokenizers with a tokenizer.json (fast ones) tell the bytes of a token")
    source = SourceConfig(
        path=str(settings.data), text_field=settings.options.get("field", "text"), max_document_bytes=LARGEST_DOCUMENT
    )
    # The name of a special token in the text is text.
    encoder = plain_encoder(subject.tokenizer)
    divider = subject.tokenizer.eos_token_id
    for text in read_texts([source]):
        encoded = encoder.encode(text, add_special_tokens=False)
        if encoded.ids:
            yield _stream(text, encoded, divider)


def _stream(text: str, encoded: Any, divider: int | None) -> Stream:
    sizes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    width = 1 + (sizes >= 0x80).astype(np.int64) + (sizes >= 0x800) + (sizes >= 0x10000)
    before = np.concatenate([[0], np.cumsum(width)])  # bytes before each character
    ends = before[np.array([end for _, end in encoded.offsets])]
    ends = np.maximum.accumulate(ends)
    ends[-1] = before[-1]  # blanks that no token covers belong to the last
    ids, is_text = np.array(encoded.ids, dtype=np.int64), np.ones(len(ends), dtype=bool)
    if divider is not None:
        ids, ends, is_text = np.append(ids, divider), np.append(ends, ends[-1]), np.append(is_text, False)
    return Stream(ids, ends, is_text)


def _joined(documents: Iterator[Stream], enough: int | None) -> Stream:
    parts, tokens, size = [_EMPTY], 0, 0
    for document in documents:
        parts.append(Stream(document.ids, document.byte_ends + size, document.is_text))
        tokens, size = tokens + len(document.ids), size + int(document.byte_ends[-1])
        if enough is not None and tokens >= enough:
            break
    return Stream(*(np.concatenate([getattr(part, key) for part in parts]) for key in ("ids", "byte_ends", "is_text")))


def _apart(documents: Iterator[Stream], lengths: tuple[int, ...], enough: int | None) -> list[Stream]:
    kept: list[Stream] = []
    longest, found = _EMPTY, 0
    for document in documents:
        longest = max(longest, document, key=lambda each: len(each.ids))
        if len(document.ids) > lengths[0]:
            kept.append(document)
            found += max(0, len(document.ids) - lengths[-1])
        if enough is not None and found >= enough:
            break
    return kept or [longest]


_EMPTY = Stream(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
