"""The runtime: a folder in, text out. Generate, stream, chat, and sessions whose state can be kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from typing_extensions import Unpack

from fusiontree.deploy.chat import DEFAULT_CHAT_STOP, chat_text, common_length, opening
from fusiontree.deploy.loading import load_saved_tokenizer
from fusiontree.deploy.requests import MAX_CHOICES, ChoiceEnd, Completion, Limits, Request, RequestEnd, Usage
from fusiontree.deploy.sampling import GenerationOptions, Options
from fusiontree.deploy.scheduler_engine import Engine
from fusiontree.deploy.scheduler_streams import Job
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.deploy.session import CACHE_FILE, Session, SessionRecord, load_cache, read_record
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.models.cache import HybridCache
from fusiontree.models.fingerprint import model_fingerprint
from fusiontree.models.json_files import one_line
from fusiontree.models.loading import load_model


class InferenceRuntime:
    """Loads a model folder once and generates from it.

    `device` None takes the GPU when there is one; `dtype` None keeps the stored one. CheckpointError when the folder is
    not a FusionTree checkpoint with a tokenizer that fits.
    """

    def __init__(
        self, model_path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_model(model_path, dtype=dtype, device=self.device)
        self.tokenizer = load_saved_tokenizer(model_path)
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise CheckpointError(
                f"{model_path}: the tokenizer has {len(self.tokenizer)} tokens, "
                f"the model only {self.model.config.vocab_size}"
            )
        self.fingerprint = model_fingerprint(self.model)
        self.max_length: int = self.model.config.max_position_embeddings
        self.stop_ids = self._stop_ids()

    def _stop_ids(self) -> frozenset[int]:
        found: set[int] = set()
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = owner.eos_token_id
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(found)

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> str: ...
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompt: str | list[str] | tuple[str, ...], **options: Unpack[Options]) -> str | list[str]:
        """The continuation of one prompt, or of several at once: row i equals prompt i alone with seed + i."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ConfigError("prompt: give at least one")
        chosen = GenerationOptions(**options)
        seeded = [replace(chosen, seed=(chosen.seed or 0) + row) for row in range(len(prompts))]
        pieces: list[list[str]] = [[] for _ in prompts]
        for row, piece in self._pieces([Request(p, o) for p, o in zip(prompts, seeded, strict=True)]):
            pieces[row].append(piece)
        texts = ["".join(parts) for parts in pieces]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
        """The continuation piece by piece as it is made, always in whole characters; joined it equals `generate`."""
        return (piece for _, piece in self._pieces([Request(prompt, GenerationOptions(**options))]))

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> str:
        """The assistant's answer to messages of the form {"role": "system"|"user"|"assistant", "content": text}."""
        return "".join(self.stream_chat(messages, **options))

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> Iterator[str]:
        """`chat`, piece by piece. Uses the tokenizer's chat template, or a plain "User: … Assistant:" dialogue."""
        request = self.chat_request(messages, GenerationOptions(**options))
        return (piece for _, piece in self._pieces([request]))

    def complete(self, request: Request) -> tuple[list[Completion], Usage]:
        """Answer one request in this thread: a completion per choice, with log-probabilities and gates if wanted."""
        (job,) = jobs = self._jobs([request])
        for _ in self._steps(jobs):
            pass
        return job.ticket.result()

    def chat_request(
        self, messages: Sequence[Mapping[str, str]], options: GenerationOptions | None = None, **fields: Any
    ) -> Request:
        """A request for the assistant's answer; `fields` are those of `Request`. The system prompt's end is marked."""
        options = options or GenerationOptions()
        text, special = chat_text(self.tokenizer, messages), not self.tokenizer.chat_template
        if special:
            options = replace(options, stop=(*options.stops, DEFAULT_CHAT_STOP))
        ids = self.encode(text, add_special_tokens=special)
        marks: tuple[int, ...] = ()
        if other := opening(messages):
            others = self.encode(chat_text(self.tokenizer, other), add_special_tokens=special)
            marks = (common_length(ids, others),)
        return Request(ids, options, marks=marks, **fields)

    def request_ids(self, request: Request, slots: int = MAX_CHOICES) -> list[int]:
        """The prompt's token ids; ConfigError when the request does not fit this model or so many slots."""
        if request.n > slots:
            raise ConfigError(f"n is {request.n}, but only {slots} answers can be written at a time")
        prompt = request.prompt
        ids = self.encode(prompt, add_special_tokens=request.add_special_tokens) if isinstance(prompt, str) else prompt
        vocabulary = self.model.config.vocab_size
        if (highest := max(ids)) >= vocabulary:
            raise ConfigError(f"token {highest} of the prompt does not exist; the vocabulary has {vocabulary} tokens")
        self.check_length(len(ids), request.options.max_new_tokens)
        return list(ids)

    def start_session(self, prompt: str, seed: int = 0) -> Session:
        """A session that begins with `prompt`; `seed` belongs to it until another is given."""
        ids = self.encode(prompt)
        self.check_length(len(ids), 1)
        GenerationOptions(seed=seed)
        record = SessionRecord(fingerprint=self.fingerprint, seed=seed, ids=ids, fed=0, read=len(ids), emitted=0)
        return Session(self, record)

    def restore_session(self, folder: str | Path) -> Session:
        """A session saved earlier with this model; it goes on exactly where it was."""
        folder = Path(folder)
        record = read_record(folder, self.fingerprint, self.model.config.vocab_size)
        past = (
            load_cache(HybridCache(self.model.config), folder / CACHE_FILE, record, self.device) if record.fed else None
        )
        return Session(self, record, past)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ConfigError when it is empty or not valid Unicode."""
        if not isinstance(text, str) or not text:
            raise ConfigError("the prompt is empty or not a text; give at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise ConfigError(f"the prompt is not valid Unicode: {one_line(problem)}") from None
        ids = list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        if not ids:
            raise ConfigError("the prompt holds nothing that the tokenizer knows")
        return ids

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """ConfigError when prompt and new tokens together do not fit the model."""
        if prompt_tokens + new_tokens > self.max_length:
            raise ConfigError(
                f"{prompt_tokens} prompt tokens and max_new_tokens {new_tokens} are more than the {self.max_length} "
                "positions of this model; shorten one of them"
            )

    def _pieces(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """Check the requests now, then yield (request, piece of its text)."""
        return self._pieces_of(self._jobs(requests))

    def _pieces_of(self, jobs: list[Job]) -> Iterator[tuple[int, str]]:
        for _ in self._steps(jobs):
            for place, job in enumerate(jobs):
                for event in job.ticket.arrived():
                    if isinstance(event, ChoiceEnd) and event.error:
                        raise CheckpointError(event.error)
                    if not isinstance(event, RequestEnd) and event.text:
                        yield place, event.text

    def _jobs(self, requests: Sequence[Request]) -> list[Job]:
        known = [(request, self.request_ids(request)) for request in requests]
        return [Job(Ticket(request, len(ids)), ids, self) for request, ids in known]

    def _steps(self, jobs: list[Job]) -> Iterator[None]:
        """Decode the jobs together in this thread, yielding after each step."""
        engine = Engine(self, Limits(prefix_bytes=0))
        for job in jobs:
            engine.add(job)
        while engine.busy:
            engine.step()
            yield
