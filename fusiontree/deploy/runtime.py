"""The runtime: a folder in, text out. Generate, stream, chat, and sessions whose state can be kept."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from typing_extensions import Unpack

from fusiontree.deploy.decoding import Decoding
from fusiontree.deploy.fingerprint import model_fingerprint
from fusiontree.deploy.loading import load_saved_tokenizer
from fusiontree.deploy.sampling import GenerationOptions, Options
from fusiontree.deploy.session import CACHE_FILE, Session, SessionRecord, load_cache, read_record
from fusiontree.deploy.text_stream import TextStream
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.models.cache import HybridCache
from fusiontree.models.json_files import one_line
from fusiontree.models.loading import load_model

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}Assistant:"
)
DEFAULT_CHAT_STOP = "\nUser:"
ROLES = ("system", "user", "assistant")


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
        self._pad_id: int = self.tokenizer.pad_token_id or 0  # masked out: any id does

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
        pieces: list[list[str]] = [[] for _ in prompts]
        for row, piece in self._pieces([self._checked_ids(p, chosen) for p in prompts], chosen):
            pieces[row].append(piece)
        texts = ["".join(parts) for parts in pieces]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
        """The continuation piece by piece as it is made, always in whole characters; joined it equals `generate`."""
        chosen = GenerationOptions(**options)
        ids = self._checked_ids(prompt, chosen)
        return (piece for _, piece in self._pieces([ids], chosen))

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> str:
        """The assistant's answer to messages of the form {"role": "system"|"user"|"assistant", "content": text}."""
        return "".join(self.stream_chat(messages, **options))

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> Iterator[str]:
        """`chat`, piece by piece. Uses the tokenizer's chat template, or a plain "User: … Assistant:" dialogue."""
        text = self._chat_text(messages)
        if not self.tokenizer.chat_template:
            given = options.get("stop", ())
            options["stop"] = (*([given] if isinstance(given, str) else given), DEFAULT_CHAT_STOP)
        chosen = GenerationOptions(**options)
        ids = self.encode(text, add_special_tokens=not self.tokenizer.chat_template)
        self.check_length(len(ids), chosen.max_new_tokens)
        return (piece for _, piece in self._pieces([ids], chosen))

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

    def _checked_ids(self, prompt: str, options: GenerationOptions) -> list[int]:
        ids = self.encode(prompt)
        self.check_length(len(ids), options.max_new_tokens)
        return ids

    def _pieces(self, rows: list[list[int]], options: GenerationOptions) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of its text) for prompts of token ids."""
        decoding = Decoding(self.model, rows, self._pad_id)
        texts = [TextStream(self.tokenizer, ids, options.stops) for ids in rows]
        for step in decoding.tokens(options, options.seed or 0, self.stop_ids):
            for row, token in enumerate(step):
                if token is None:
                    continue
                if piece := texts[row].push(token):
                    yield row, piece
                decoding.ended[row] = texts[row].stopped
            if all(decoding.ended):
                break
        for row, text in enumerate(texts):
            if rest := text.finish():
                yield row, rest

    def _chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        for place, message in enumerate(messages):
            if not (_is_message(message) and message["role"] in ROLES):
                raise ConfigError(f"messages[{place}]: needs a role ({', '.join(ROLES)}) and a content that is text")
        if not messages:
            raise ConfigError("messages: give at least one")
        template = self.tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as problem:  # a template is a program of the folder's author: anything may go wrong in it
            where = f"{self.tokenizer.name_or_path}: the chat template"
            raise CheckpointError(f"{where} cannot be used: {one_line(problem)}") from None


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
