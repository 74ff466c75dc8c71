"""Any causal language model with its tokenizer: it scores text and writes, in batches. Shapes: B rows, L tokens."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.perplexity import ROWS_PER_CHUNK
from fusiontree.eval.stopping import Stops
from fusiontree.eval.task import TokenText
from fusiontree.models.fingerprint import model_fingerprint

LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
NO_LIMIT = 10**9  # tokenizers without a length say about 1e30
LOGITS_AT_ONCE = 1 << 29  # 1 GB in bf16, 2 GB in fp32

Pair = tuple[list[int], list[int]]
"""Token ids of a context (at least one) and of its continuation."""


class Subject:
    """A model under evaluation: ours, a pruned export, or any Hugging Face causal model.

    `max_length`: tokens it may see at once, prompt and answer together; None: what its config says, else its tokenizer
    (ConfigError when neither does). `batch_size` rows are computed together. The model is put into evaluation mode.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int | None = None, batch_size: int = 8, name: str = ""
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size}: at least 1")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device: torch.device = next(model.parameters()).device
        self.name = name or model.config.model_type
        self.batch_size = batch_size
        self.max_length = checked_length(model, tokenizer, max_length)
        self.text = TokenText(tokenizer, self.max_length)
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.end_ids = _end_ids(model, tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Name of the weights."""
        return model_fingerprint(self.model)

    @property
    def prefix_id(self) -> int:
        """What a text is conditioned on when nothing stands before it: BOS, else EOS. DataError without either."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError(f"{self.name}: its tokenizer has neither a BOS nor an EOS token to begin a text with")

    @torch.no_grad()
    def logits(self, ids: Tensor, last: int = 0) -> Tensor:
        """Logits (B, L, V) of ids (B, L), on the model's device; only of the `last` columns when that is not 0."""
        keep = {"logits_to_keep": last} if last and self._keeps_last else {}
        logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False, **keep).logits
        return logits[:, -last:]

    @cached_property
    def _keeps_last(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Ids of a context and its continuation; spaces between them belong to the continuation.

        They are tokenised together and then divided. An empty context is the prefix token.
        """
        if not context:
            ids = self.text.encode(continuation)
            if not ids:
                raise DataError("a continuation is empty: there is nothing to score")
            return (ids[:1], ids[1:]) if ids[0] == self.prefix_id and len(ids) > 1 else ([self.prefix_id], ids)
        bare = context.rstrip()
        head = self.text.encode(bare, special=True) if bare else [self.prefix_id]
        whole = self.text.encode(context + continuation, special=bool(bare))
        rest = whole[len(head) :] if bare else whole
        if not rest:
            raise DataError(f"a continuation adds no token to its context: {continuation[:40]!r}")
        return head, rest

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, in nats, and whether it is what greedy would write.

        DataError for a pair that is longer than the model may see.
        """
        rows = [self.encode_pair(*pair) for pair in pairs]
        return [(sum(scores.tolist()), greedy) for scores, greedy in self.score(rows)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each text, in nats: disjoint windows, each token once, the first given the prefix."""
        windows = [list(self.windows(self.text.encode(text, special=True))) for text in texts]
        scores = iter(self.score([pair for row in windows for pair in row]))
        return [sum(sum(next(scores)[0].tolist()) for _ in row) for row in windows]

    def windows(self, ids: Sequence[int]) -> Iterator[Pair]:
        """Pieces of at most `max_length` tokens to be predicted, and what each is predicted from.

        A full piece sees one token before it, the last one as many as fit.
        """
        known = [self.prefix_id, *ids]
        for begin in range(0, len(ids), self.max_length):
            piece = list(ids[begin : begin + self.max_length])
            # The model is fed all but the piece's last token: as many as `max_length` allows.
            room = self.max_length - (len(piece) - 1)
            yield known[begin + 1 - room : begin + 1] if begin else known[:1], piece

    def score(self, rows: Sequence[Pair]) -> list[tuple[Tensor, bool]]:
        """Per row the log-probabilities of its continuation's tokens, fp32 on the CPU; and whether all are arg-max.

        Rows are batched by length. DataError for one that is longer than the model may see.
        """
        for context, continuation in rows:
            self._check_fits(len(context) + len(continuation) - 1, 0)
        pieces = [piece for pair in rows for piece in self._pieces(*pair)]
        lengths = [len(context) + len(rest) for context, rest in pieces]
        found: dict[int, tuple[Tensor, bool]] = {}
        for batch in self._batches(lengths, [len(context) for context, _ in pieces]):
            found.update(zip(batch, self._score_batch([pieces[i] for i in batch]), strict=True))
        scored = iter(found[i] for i in range(len(pieces)))
        of_rows = [[next(scored) for _ in self._pieces(*pair)] for pair in rows]
        return [(torch.cat([each for each, _ in parts]), all(best for _, best in parts)) for parts in of_rows]

    def _pieces(self, context: list[int], rest: list[int]) -> Iterator[Pair]:
        """A continuation whose logits would be too many to hold, in parts that are each the context of the next."""
        most = max(1, LOGITS_AT_ONCE // self.vocab_size)
        for begin in range(0, len(rest), most):
            yield context + rest[:begin], rest[begin : begin + most]

    def _score_batch(self, rows: list[Pair]) -> list[tuple[Tensor, bool]]:
        # Right padding and no mask: what comes later cannot change a causal model's earlier logits.
        inputs = [(context + rest)[:-1] for context, rest in rows]
        length = max(map(len, inputs))
        first = min(len(context) - 1 for context, _ in rows)
        ids = self._tensor([row + [0] * (length - len(row)) for row in inputs])
        logits = self.logits(ids, last=length - first)
        scores = []
        for row, (context, rest) in enumerate(rows):
            begin = len(context) - 1 - first
            scores.append(_token_scores(logits[row, begin : begin + len(rest)], self._tensor(rest)))
        return scores

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        chat: bool = False,
        never_empty: bool = False,
    ) -> list[str]:
        """What the model writes after each prompt, most probable token first, ended before the first stop or end token.

        `chat`: through the tokenizer's chat template. `never_empty`: the first token is no end and ends no stop.
        DataError when prompt and answer do not fit the model together.
        """
        rows = [self.prompt_ids(prompt, chat) for prompt in prompts]
        return self.continue_ids(rows, max_new_tokens, stop, never_empty=never_empty)

    def prompt_ids(self, prompt: str, chat: bool = False) -> list[int]:
        """What the model is fed for a prompt; the prefix token alone for an empty one."""
        templated = chat and bool(self.tokenizer.chat_template)
        text = self.text.chat(prompt) if templated else prompt
        return self.text.encode(text, special=not templated) or [self.prefix_id]

    def continue_ids(
        self,
        rows: Sequence[list[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        never_empty: bool = False,
    ) -> list[str]:
        """`generate` for prompts given as token ids."""
        for row in rows:
            self._check_fits(len(row), max_new_tokens)
        found: dict[int, str] = {}
        lengths = [len(row) for row in rows]
        for batch in self._batches(lengths, lengths):
            written = self._generate_batch([rows[i] for i in batch], max_new_tokens, tuple(stop), never_empty)
            found.update(zip(batch, written, strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def _generate_batch(
        self, rows: list[list[int]], max_new_tokens: int, stop: tuple[str, ...], never_empty: bool
    ) -> list[str]:
        length = max(map(len, rows))
        pad = self._pad_id
        ids = self._tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = self._tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        stops = Stops(self.text, stop, self.end_ids, prompt_length=length, rows=len(rows))
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=pad,
            begin_suppress_tokens=self._never_first(stop) if never_empty else None,
            use_cache=True,
        )
        with only_settings(self.model, settings):
            out = self.model.generate(
                ids, attention_mask=mask, generation_config=settings, stopping_criteria=StoppingCriteriaList([stops])
            )
        return stops.texts(out)

    @property
    def _pad_id(self) -> int:
        """Masked out, so any id of the embedding will do."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and pad < self.vocab_size else min(self.end_ids, default=0)

    def _never_first(self, stop: tuple[str, ...]) -> list[int] | None:
        endings = [self.text.encode(text)[-1:] for text in stop]
        return sorted(self.end_ids | {token for ending in endings for token in ending}) or None

    def _batches(self, lengths: Sequence[int], starts: Sequence[int]) -> Iterator[list[int]]:
        """Indices of rows in batches of like length, the longest first: what does not fit memory fails at once.

        Logits are held from the first of a batch's `starts` on.
        """
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch:
                columns = lengths[batch[0]] - min(starts[i] for i in (*batch, row))
                too_many = (len(batch) + 1) * columns * self.vocab_size > LOGITS_AT_ONCE
                if too_many or len(batch) == self.batch_size:
                    yield batch
                    batch = []
            batch.append(row)
        if batch:
            yield batch

    def _check_fits(self, tokens: int, new_tokens: int) -> None:
        if tokens + new_tokens > self.max_length:
            asked = f"{tokens:,} tokens of text" + (f" and {new_tokens:,} new ones" if new_tokens else "")
            raise DataError(f"{self.name}: {asked} are more than the {self.max_length:,} it may see; nothing was cut")

    def _tensor(self, ids: Any) -> Tensor:
        tensor = torch.tensor(ids, dtype=torch.long)
        if tensor.numel() and int(tensor.max()) >= self.vocab_size:
            raise DataError(
                f"{self.name}: the tokenizer gives id {int(tensor.max())}, the model has {self.vocab_size} embeddings; "
                "give the tokenizer that belongs to it"
            )
        return tensor.to(self.device)


def checked_length(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """Tokens the model may see: `wanted`, else what its config says, else its tokenizer.

    More than the config says is allowed where positions are computed, refused where they are a learned table.
    """
    limit = context_limit(model.config, tokenizer)
    if wanted is None:
        if limit is None:
            raise ConfigError(
                f"--max-length: neither the config of this {model.config.model_type} model nor its tokenizer says how "
                "long a text may be; give a number of tokens"
            )
        return limit
    if wanted < 2:
        raise ConfigError(f"--max-length {wanted}: at least 2 tokens")
    if limit is not None and wanted > limit and learned_positions(model):
        raise ConfigError(
            f"--max-length {wanted}: this model has a learned table of {limit} positions; at most {limit}"
        )
    return wanted


def context_limit(config: Any, tokenizer: Any) -> int | None:
    """The length that a config states under one of its usual names, else the tokenizer's; None when neither has one."""
    text_config = config.get_text_config(decoder=True)
    for key in LENGTH_KEYS:
        value = getattr(text_config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 0 < limit < NO_LIMIT else None


def learned_positions(model: Any) -> bool:
    """Whether positions are looked up in a table of weights, beyond which there are none."""
    words = model.get_input_embeddings()
    return any(
        isinstance(module, torch.nn.Embedding) and module is not words and {"pos", "wpe", "srte"} & set(_words(name))
        for name, module in model.named_modules()
    )


def _words(name: str) -> list[str]:
    """Parts of a module's name, "position…" and the like shortened to "pos"."""
    return ["pos" if part.startswith("pos") else part for part in name.replace("_", ".").split(".")]


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return frozenset(found)


def _token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, bool]:
    """Log-probabilities of targets (N,) under logits (N, V), fp32, and whether each is the most probable token."""
    scores, best = [], True
    for some, goal in zip(logits.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
        scores.append(some.float().log_softmax(-1).gather(-1, goal[:, None])[:, 0])
        best = best and bool((some.argmax(-1) == goal).all())
    return torch.cat(scores).cpu(), best


@contextlib.contextmanager
def only_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Within the context `generate` takes nothing from the model's own settings (a repetition penalty, say)."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
