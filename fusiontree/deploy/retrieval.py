"""Retrieval: passages of local files found by BM25 and put before a prompt, as far as the model has room.

Words are lower-case; runs of Chinese, Japanese or Korean characters count as pairs of neighbours, which needs no
dictionary. Needs the extra `retrieve` (bm25s).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusiontree.data.config import SourceConfig
from fusiontree.data.records import BadRecords
from fusiontree.data.sources import read_source
from fusiontree.deploy.files import new_folder
from fusiontree.errors import ConfigError, DataError, FusionTreeError
from fusiontree.models.json_files import one_line
from fusiontree.models.manifest import MANIFEST, seal, verify

PASSAGES = "passages.jsonl"
SCORES = "bm25"
_FORMAT = "fusiontree-index"
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORDS = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
_SPARE = 8  # tokens left free: what stands at a seam may be cut into other tokens than on its own


@dataclass(frozen=True)
class Passage:
    """A stretch of a file."""

    source: str
    line: int
    """Of its first line in the file, from 1."""
    text: str


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float

    def told(self) -> dict[str, Any]:
        """As JSON for whoever asked."""
        return {**asdict(self.passage), "score": round(self.score, 4)}


def words(text: str) -> list[str]:
    """What is looked for in a text."""
    found: list[str] = []
    for run in _WORDS.findall(unicodedata.normalize("NFKC", text).casefold()):
        pairs = [run[i : i + 2] for i in range(len(run) - 1)]
        found += pairs if pairs and re.match(rf"[{_CJK}]", run) else [run]
    return found


def passages_of(paths: Sequence[str], size: int = 800) -> Iterator[Passage]:
    """The passages of text, JSONL or Parquet files, cut at line ends after about `size` characters."""
    for path in paths:
        for document in read_source(SourceConfig(path=path), BadRecords()):
            for line, text in _cut(document.text, size):
                yield Passage(document.path, document.line + line, text)


def _cut(text: str, size: int) -> Iterator[tuple[int, str]]:
    """(line from 0, stretch) of a text; only a line longer than `size` is cut within."""
    begin, held = 0, ""
    for number, line in enumerate(text.splitlines(keepends=True)):
        for start in range(0, len(line), size):
            piece = line[start : start + size]
            if held and len(held) + len(piece) > size:
                yield begin, held.strip()
                held = ""
            if not held.strip():
                begin, held = number, ""
            held += piece
    if held.strip():
        yield begin, held.strip()


def build_index(paths: Sequence[str], folder: str | Path, size: int = 800) -> int:
    """Index files, write the index to a new folder (or over an older index) and return the number of passages."""
    if size < 1:
        raise ConfigError(f"a passage must have at least 1 character; given {size}")
    found = [passage for passage in passages_of(paths, size) if words(passage.text)]
    if not found:
        raise DataError(f"index: no text with words in {', '.join(paths)}")
    scores = _bm25().BM25()
    scores.index([words(passage.text) for passage in found], show_progress=False)
    with new_folder(Path(folder), MANIFEST, DataError) as temporary:
        with open(temporary / PASSAGES, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(passage), ensure_ascii=False) + "\n" for passage in found)
        scores.save(str(temporary / SCORES), show_progress=False)
        seal(temporary, {"kind": _FORMAT, "passages": len(found)})
    return len(found)


class Index:
    """A loaded index; DataError when the folder is none or differs from what was written."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        bm25s = _bm25()
        try:
            facts = verify(folder)
            if facts.get("kind") != _FORMAT:
                raise DataError(f"{folder}: is not an index; make one with `fusiontree index build`")
            with open(folder / PASSAGES, encoding="utf-8") as file:
                self.passages = [Passage(**json.loads(line)) for line in file]
            self._scores = bm25s.BM25.load(str(folder / SCORES), allow_pickle=False, show_progress=False)
        except DataError:
            raise
        except (FusionTreeError, OSError, ValueError, TypeError, KeyError) as problem:
            raise DataError(f"{folder}: the index cannot be read: {one_line(problem)}") from None

    def search(self, text: str, most: int = 4) -> list[Hit]:
        """The passages that share words with a text, best first."""
        known = [word for word in words(text) if word in self._scores.vocab_dict]
        if not known:
            return []
        places, scores = self._scores.retrieve([known], k=min(most, len(self.passages)), show_progress=False)
        pairs = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [Hit(self.passages[place], score) for place, score in pairs if score > 0]


def fitting(hits: Iterable[Hit], count: Callable[[str], int], room: int) -> tuple[str, list[Hit]]:
    """The text to put before a prompt, and the hits in it: the best ones that fit into `room` tokens together."""
    taken: list[Hit] = []
    text = ""
    for hit in hits:
        passage = hit.passage
        longer = f"{text}[{len(taken) + 1}] {passage.source}:{passage.line}\n{passage.text}\n\n"
        if count(longer) + _SPARE <= room:
            text, taken = longer, [*taken, hit]
    return text, taken


def before_prompt(index: Index, runtime: Any, prompt: str, new_tokens: int) -> tuple[str, list[Hit]]:
    """A prompt with the passages that help with it, and those passages; without any, the prompt as it is."""
    room = runtime.max_length - new_tokens - len(runtime.encode(prompt))
    text, hits = fitting(index.search(prompt), lambda part: len(runtime.encode(part)), room)
    return text + prompt, hits


def before_question(
    index: Index, runtime: Any, messages: Sequence[Mapping[str, str]], new_tokens: int
) -> tuple[list[dict[str, str]], list[Hit]]:
    """A conversation whose last question has the passages that help with it before it, and those passages."""
    known = [dict(message) for message in messages]
    last = next((message for message in reversed(known) if message.get("role") == "user"), None)
    if last is None:
        return known, []
    room = runtime.max_length - new_tokens - len(runtime.chat_request(known).prompt)
    text, hits = fitting(index.search(last["content"]), lambda part: len(runtime.encode(part)), room)
    last["content"] = text + last["content"]
    return known, hits


def _bm25() -> Any:
    try:
        import bm25s
    except ModuleNotFoundError:
        raise ConfigError("retrieval needs the package bm25s: pip install 'fusiontree[retrieve]'") from None
    return bm25s
