"""A text in progress with its state: it can be continued, forked, saved to disk and restored, and goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Unpack

from fusiontree.deploy.decoding import Decoding
from fusiontree.deploy.files import new_folder, write_json
from fusiontree.deploy.sampling import GenerationOptions, Options
from fusiontree.deploy.text_stream import TextStream
from fusiontree.errors import CheckpointError
from fusiontree.models.cache import HybridCache
from fusiontree.models.json_files import one_line, read_json
from fusiontree.models.manifest import sha256_of

if TYPE_CHECKING:
    from fusiontree.deploy.runtime import InferenceRuntime

SESSION_FILE = "session.json"
CACHE_FILE = "cache.safetensors"
MAX_SESSION_BYTES = 256 * 1024 * 1024
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class SessionRecord(BaseModel):
    """What `session.json` holds: the tokens, how many of them the cache has seen, how much text was given out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["fusiontree-session"] = "fusiontree-session"
    version: Literal[1] = 1
    fingerprint: str
    seed: int = Field(ge=0)
    ids: list[TokenId] = Field(min_length=1)
    fed: int = Field(ge=0)
    read: int = Field(ge=0)
    emitted: int = Field(ge=0)
    cache_sha256: str | None = None


class Session:
    """One text of a runtime; made by `InferenceRuntime.start_session` or `restore_session`."""

    def __init__(self, runtime: InferenceRuntime, record: SessionRecord, past: HybridCache | None = None) -> None:
        self.runtime = runtime
        self.record = record
        self.past = past

    @property
    def ids(self) -> list[int]:
        """All tokens so far: prompt, what was appended and what was generated."""
        return self.record.ids

    @property
    def text(self) -> str:
        """All text so far."""
        return self.runtime.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def append(self, text: str) -> None:
        """Add the user's text; it is read by the model when the next token is asked for."""
        self.ids.extend(self.runtime.encode(text, add_special_tokens=False))
        self.record.read, self.record.emitted = len(self.ids), 0

    def generate(self, **options: Unpack[Options]) -> str:
        """Continue the text and return what is new."""
        return "".join(self.stream(**options))

    def stream(self, **options: Unpack[Options]) -> Iterator[str]:
        """Continue the text, yielding what is new in whole characters; may be left at any time."""
        chosen = GenerationOptions(**options)
        self.runtime.check_length(len(self.ids), chosen.max_new_tokens)
        return self._stream(chosen)

    def _stream(self, options: GenerationOptions) -> Iterator[str]:
        if options.seed is not None:
            self.record.seed = options.seed
        record = self.record
        decoding = Decoding(self.runtime.model, self.ids, self.past, record.fed)
        text = TextStream(self.runtime.tokenizer, self.ids, options.stops, record.read, record.emitted)
        for token in decoding.tokens(options, record.seed, self.runtime.stop_ids, len(self.ids)):
            piece = "" if token is None else text.push(token)
            self.past, record.fed, record.ids = decoding.past, decoding.fed, list(decoding.ids)
            record.read, record.emitted = (len(self.ids), 0) if token is None else (text.read, text.emitted)
            if piece:
                yield piece
            if text.stopped:
                return
        if rest := text.finish():
            yield rest

    def fork(self) -> Session:
        """An independent copy that goes on from here; ask it for another `seed` to make it draw differently."""
        past = None if self.past is None else self.past.fork()
        return Session(self.runtime, self.record.model_copy(deep=True), past)

    def save(self, folder: str | Path) -> Path:
        """Write the session to a new folder, or over an earlier save; nothing half-written is ever seen there."""
        target = Path(folder)
        with new_folder(target, SESSION_FILE, CheckpointError) as temporary:
            self.record.cache_sha256 = None
            if self.past is not None:
                self.past.save(temporary / CACHE_FILE)
                self.record.cache_sha256 = sha256_of(temporary / CACHE_FILE)
            write_json(temporary / SESSION_FILE, self.record.model_dump(), CheckpointError)
        return target


def read_record(folder: Path, fingerprint: str, vocab_size: int) -> SessionRecord:
    """The checked record of a saved session; CheckpointError when malformed or of another model."""
    path = folder / SESSION_FILE
    data = read_json(path, MAX_SESSION_BYTES, CheckpointError)
    try:
        record = SessionRecord.model_validate(data)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {place}: {one_line(first['msg'])}") from None
    if record.fingerprint != fingerprint:
        raise CheckpointError(f"{path}: saved with another model (fingerprint {one_line(record.fingerprint, 50)})")
    if max(record.ids) >= vocab_size:
        raise CheckpointError(f"{path}: token {max(record.ids)} does not exist; the vocabulary has {vocab_size} tokens")
    if not (record.fed < len(record.ids) and record.read <= len(record.ids)):
        raise CheckpointError(f"{path}: fed {record.fed} and read {record.read} do not fit {len(record.ids)} tokens")
    return record


def load_cache(past: HybridCache, path: Path, record: SessionRecord, device: torch.device) -> HybridCache:
    """Fill the empty cache `past` from a file; CheckpointError when it is not the one the record was saved with."""
    try:
        if sha256_of(path) != record.cache_sha256:  # safetensors alone does not notice a flipped bit
            raise CheckpointError(f"{path}: is not the state that was saved with {SESSION_FILE}: damaged or exchanged")
        past.load(path, device=device)
    except (OSError, KeyError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{path}: the saved state cannot be read: {one_line(problem)}") from None
    if (seen := past.get_seq_length()) != record.fed:
        raise CheckpointError(f"{path}: the saved state has seen {seen} tokens, {SESSION_FILE} says {record.fed}")
    return past
