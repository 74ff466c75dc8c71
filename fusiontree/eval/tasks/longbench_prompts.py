"""LongBench's prompt templates: the authors' text, shipped under its licence, or those of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from fusiontree.errors import DataError

PLACE = re.compile(r"\{(?:context|input)\}")


class Template(NamedTuple):
    """Text with {context} and {input}, and whether it is the official one."""

    text: str
    official: bool

    def filled(self, context: str, question: str) -> str:
        """The prompt; braces in what is put in, and other braces of the template, mean nothing."""
        values = {"{context}": context, "{input}": question}
        return PLACE.sub(lambda place: values[place.group()], self.text)


def template(dataset: str, file: str | None = None) -> Template:
    """The official template of a data set, or that of `file` (JSON, data set -> text). DataError for a useless file."""
    if file is None:
        return Template(official_templates()[dataset], True)
    text = _from_file(Path(file), dataset)
    return Template(text, text == official_templates()[dataset])


@cache
def official_templates() -> Mapping[str, str]:
    """The authors' templates by data set."""
    content = (files("fusiontree.eval.tasks") / "data" / "longbench_prompts.json").read_text("utf-8")
    templates: dict[str, str] = json.loads(content)["templates"]
    return templates


def _from_file(path: Path, dataset: str) -> str:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))[dataset]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--option templates={path}: no template for {dataset} can be read from it ({error})"
        ) from error
    if not isinstance(text, str) or "{context}" not in text:
        raise DataError(f"--option templates={path}: the template for {dataset} has no {{context}}")
    return text
