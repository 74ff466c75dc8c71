"""Corpora of the Hugging Face hub, by name, into one JSONL file: with progress, and going on after an interruption."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fusiontree.data.config import SourceConfig
from fusiontree.data.progress import byte_progress
from fusiontree.data.records import BadRecords
from fusiontree.data.streaming import TextStream
from fusiontree.errors import DataError


class Corpus(NamedTuple):
    """A corpus on the hub; `{language}` in the subset stands for the language asked for."""

    path: str
    subset: str | None
    text_field: str = "text"


CORPORA = {
    "wikipedia": Corpus("wikimedia/wikipedia", "20231101.{language}"),
    "wikitext": Corpus("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "c4": Corpus("allenai/c4", "{language}"),
    "fineweb-edu": Corpus("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "tinystories": Corpus("roneneldan/TinyStories", None),
}


def corpus_source(
    name: str, language: str = "en", subset: str | None = None, split: str = "train", text_field: str | None = None
) -> SourceConfig:
    """A name of `CORPORA`, or any of the hub (owner/name), as a stream. Raises DataError for what can be neither."""
    known = CORPORA.get(name.lower())
    if known is None and "/" not in name:
        raise DataError(f"{name}: no corpus of this name; allowed: {', '.join(CORPORA)}, or owner/name on the hub")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{1,15}", language):
        raise DataError(f"language {language!r}: not a code such as en, zh or simple")
    path, chosen, field = known or Corpus(name, None)
    chosen = subset or (chosen.format(language=language) if chosen else None)
    return SourceConfig(path=path, mode="streaming", subset=chosen, split=split, text_field=text_field or field)


def download(source: SourceConfig, out: str | Path, limit: int | None = None) -> BadRecords:
    """Write a stream's documents as JSONL lines to `out`, at most `limit`; gives what was left out.

    Meanwhile the lines are in `out`.part, beside a note of how far they go; called again, it goes on from there. Raises
    DataError when the hub cannot be reached, or `out` exists already, or cannot be written.
    """
    target = Path(out).expanduser()
    if target.suffix != ".jsonl":
        raise DataError(f"{target}: the name must end in .jsonl")
    if target.exists():
        raise DataError(f"{target}: already there; delete it or name another file")
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    asked = {"source": source.model_dump(mode="json"), "limit": limit}
    state = _read_note(note, part, asked)
    stream = TextStream(source, key=0)
    if state is not None:
        stream.restore(state["stream"])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if state is not None else "wb") as handle:
            handle.truncate(handle.seek(state["bytes"] if state is not None else 0))
            _copy(stream, handle, note, asked, limit)
        if not stream.bad_records.documents:
            part.unlink()
            stream.bad_records.check(source.path, 1.0)
        os.replace(part, target)
        note.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    return stream.bad_records


def _copy(stream: TextStream, handle: BinaryIO, note: Path, asked: dict[str, Any], limit: int | None) -> None:
    """Append batches and note each, so that a kill loses at most one."""
    bad = stream.bad_records
    with byte_progress(f"downloading {asked['source']['path']}", None) as advance:
        advance(handle.tell())
        try:
            while limit is None or bad.documents < limit:
                texts = stream.documents(None if limit is None else limit - bad.documents)
                if not texts:
                    return
                lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
                handle.write(lines)
                handle.flush()
                os.fsync(handle.fileno())
                advance(len(lines))
                _write_note(note, {"asked": asked, "bytes": handle.tell(), "stream": stream.state()})
        except KeyboardInterrupt:
            how = f"interrupted after {bad.documents:,} documents; run the same command again: it goes on from there"
            raise KeyboardInterrupt(how) from None


def _write_note(note: Path, content: dict[str, Any]) -> None:
    draft = note.with_name(note.name + ".tmp")
    draft.write_text(json.dumps(content), encoding="utf-8")
    os.replace(draft, note)


def _read_note(note: Path, part: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """How far an earlier download came; None when there is none."""
    if not note.exists() or not part.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if content["asked"] == asked and part.stat().st_size >= content["bytes"]:
            return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{note}: damaged ({error}); delete it and {part.name} to start again") from error
    raise DataError(f"{part}: is half of another download; delete it and {note.name}, or name another file")
