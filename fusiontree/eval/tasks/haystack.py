"""Text to hide things in: the user's, or one that every machine has."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from fusiontree.data import SourceConfig, read_texts
from fusiontree.errors import DataError

MOST_BYTES = 64 << 20  # of the user's text: beyond the longest context there is
TEXT_SUFFIXES = (".txt", ".md")
# A sentence ends at . ! or ?, closing quotes included, before white space and something that begins a sentence.
SENTENCE_END = re.compile(r"""[.!?]+["')\]”’]*\s+(?=["'(\[“‘*]?[A-Z0-9])""")


@dataclass(frozen=True)
class Haystack:
    """A text and what it is called in results."""

    name: str
    text: str

    @cached_property
    def words(self) -> list[str]:
        """The text split at white space."""
        return self.text.split()

    @cached_property
    def label(self) -> str:
        """Name and hash: two results are about the same haystack when this is equal."""
        return f"{self.name} sha256:{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def first_words(self, count: int) -> str:
        """The first `count` words with one blank between, from the start again where the text ends."""
        repeats = -(-count // len(self.words))
        return " ".join((self.words * repeats)[:count])


@cache
def load_haystack(data: Path | None) -> Haystack:
    """The text of a file, of all .txt and .md files below a folder in sorted order, or of Python's documentation.

    Any file format of the data room will do. Raises DataError where there is no text.
    """
    if data is None:
        return Haystack(f"Python {sys.version_info.major}.{sys.version_info.minor} documentation", _documentation())
    files = [data]
    if data.is_dir():
        files = text_files(data)
        if not files:
            raise DataError(f"{data}: no {' or '.join(TEXT_SUFFIXES)} file in this folder to take text from")
    sources = [SourceConfig(path=str(file), max_document_bytes=MOST_BYTES) for file in files]
    text = "\n\n".join(read_texts(sources, MOST_BYTES))
    return Haystack(data.name, text)


def text_files(folder: Path) -> list[Path]:
    """All .txt and .md files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file())


def _documentation() -> str:
    """The prose of the topics that `help()` shows in this Python; about 190,000 characters, another in each version.

    The documentation of Python is under the PSF licence; it is read where Python lies and not copied.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python carries no pydoc_data: name a text to hide needles in with --data") from None
    paragraphs = (" ".join(part.split()) for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if _is_prose(part)))


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences and not grammar, code or a table."""
    sentence = paragraph[:1].isupper() and paragraph.endswith(".") and len(paragraph) >= 80
    return sentence and not re.search(r"::=|>>>|[=\-~]{4,}", paragraph)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space between them."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
