"""What an evaluation task is: questions put to a model, answers scored, a summary; no model code in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from fusiontree.eval.subject import Subject

Value = TypeVar("Value")


@dataclass(frozen=True)
class Sample:
    """One question put to a model. Everything in it is JSON."""

    id: str  # unique in its task and stable: the same settings give the same ids
    prompt: str  # complete, and already cut to the model's length by the task
    references: tuple[str, ...]  # gold answers
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    facts: Mapping[str, Any] = field(default_factory=dict)  # length, depth, classes …: for score and summarise
    chat: bool = False  # put through the tokenizer's chat template, when it has one
    never_empty: bool = False  # the first token of the answer is neither an end token nor the end of a stop


@dataclass(frozen=True)
class Scored:
    """A sample, what the model answered and what the answer is worth."""

    sample: Sample
    output: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Counted:
    """Samples that are made one by one, and how many there will be."""

    samples: Iterator[Sample]
    count: int

    def __iter__(self) -> Iterator[Sample]:
        return self.samples

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class TaskSettings:
    """What the command line says to tasks."""

    limit: int | None = None  # samples per task, the first ones; None: all
    seed: int = 0
    lengths: tuple[int, ...] = ()  # context lengths in tokens; empty: the task's own
    depths: tuple[float, ...] = ()  # percent, 0 = start of the context; empty: the task's own
    data: Path | None = None  # file or folder with the task's data, else the hub
    max_length: int | None = None  # tokens the model may see; None: what its config says
    official: bool = True  # False: the corrected form of a scoring that is known to be flawed
    options: Mapping[str, str] = field(default_factory=dict)  # KEY=VALUE, named in `Family.options`


class TokenText:
    """A model's tokenizer as tasks see it. `max_length`: tokens that prompt and answer together may have."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def count(self, text: str) -> int:
        """Tokens the model sees for this prompt, the BOS that some tokenizers put in front included."""
        return len(self.encode(text, special=True))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of the text; with `special` also what the tokenizer puts around a prompt (BOS), unless it begins so."""
        special = special and not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        # `verbose=False`: that a text is longer than the model is for the caller to see to.
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out, spaces are left as they are."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat(self, prompt: str) -> str:
        """The prompt as one user turn of the chat template; unchanged for a tokenizer without one."""
        if not self.tokenizer.chat_template:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text


class Named(Protocol):
    """What every task says of itself."""

    @property
    def name(self) -> str:
        """As on the command line: "needle", "longbench:qasper", "ruler:vt"."""

    @property
    def version(self) -> int:
        """Of prompt construction and metric together; raised whenever either changes."""

    @property
    def main_metric(self) -> str:
        """The one of `metrics` that stands for the task."""


class Task(Named, Protocol):
    """A task that lets the model write: questions, a score per answer, a summary. Build it cheaply, read data late."""

    def samples(self, text: TokenText, settings: TaskSettings) -> Iterable[Sample]:
        """The questions, in a fixed order, at most `settings.limit`; what has a length tells how many there are.

        Each fits: tokens of the prompt plus `max_new_tokens` ≤ `text.max_length` (the runner refuses one that does
        not). Raises DataError when the data cannot be had: where it was looked for, where to get it.
        """

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """What this answer is worth, by name; `output` ends before the first stop."""

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """{"metrics": {name: number}, "tables": {name: rows or cells}}, all JSON; plots are drawn from the tables.

        "errors": {name of a metric: standard error} may come with them; where a metric is the mean of the score of the
        same name (times 100 or not) the runner adds it. The prompts of the samples are empty here.
        """


class Progress(Protocol):
    """Told how far a task is; remembers its parts, so that a killed evaluation goes on where it was."""

    def __call__(self, done: int, total: int) -> None:
        """So many parts of `total` are done."""

    def once(self, key: str, measure: Callable[[], Value]) -> Value:
        """The JSON value kept under `key` by an earlier start, else what `measure` gives, kept at once."""


@runtime_checkable
class DirectTask(Named, Protocol):
    """A task that asks the model for more or less than text: losses, the most probable token at positions."""

    def measure(self, subject: Subject, settings: TaskSettings, progress: Progress) -> dict[str, Any]:
        """{"metrics": {name: number}, "tables": {…}, "samples": [one JSON object per sample]}, "errors" as above.

        DataError when there is nothing to measure.
        """


AnyTask = Task | DirectTask
