"""Two tokenizers as tasks see them: one id per byte, and a small BPE trained here."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

from fusiontree.data import SourceConfig, byte_tokenizer, train_tokenizer
from fusiontree.eval.task import Sample, Scored, Task, TaskSettings, TokenText
from fusiontree.eval.tasks.haystack import load_haystack

KINDS = ("byte", "bpe")


@cache
def tokenizer(kind: str) -> Any:
    if kind == "byte":
        return byte_tokenizer()
    with TemporaryDirectory() as folder:
        path = f"{folder}/text.txt"
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(load_haystack(None).text[:60_000])
        return train_tokenizer([SourceConfig(path=path)], 700, f"{folder}/tokenizer")


def token_text(kind: str, max_length: int) -> TokenText:
    return TokenText(tokenizer(kind), max_length)


def ask(task: Task, text: TokenText, **settings: Any) -> list[Sample]:
    return list(task.samples(text, TaskSettings(**settings)))


def grade(task: Task, samples: list[Sample], answer: Any) -> float:
    """The main metric, in percent, of a function that reads the prompt and answers."""
    outputs = [answer(sample.prompt) for sample in samples]
    scored = [Scored(s, output, task.score(s, output)) for s, output in zip(samples, outputs, strict=True)]
    return float(task.summarise(scored)["metrics"][task.main_metric])


def ignorant(prompt: str) -> str:
    return " I do not know. It may be red, blue or 42.\n"
