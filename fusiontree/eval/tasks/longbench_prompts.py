"""LongBench's prompt templates. They are its authors' text and not shipped: read from their file or from lm-eval.

A template is known by its hash, so that a result can say whether the prompts were the official ones.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml

from fusiontree.errors import DataError

FILE = "dataset2prompt.json"
WHERE = f"LongBench/config/{FILE} of https://github.com/THUDM/LongBench"
# SHA-256, first 16 digits, of each template in the authors' file (January 2025).
OFFICIAL = {
    "narrativeqa": "aada7ed24b06abac",
    "qasper": "0fbdd123fe7f83d6",
    "multifieldqa_en": "20b4666a2de8a1f7",
    "multifieldqa_zh": "344b3a4e557cd547",
    "hotpotqa": "9ec4ae308865bd0c",
    "2wikimqa": "9ec4ae308865bd0c",
    "musique": "9ec4ae308865bd0c",
    "dureader": "ae53329f51b17908",
    "gov_report": "91c25d585b189ced",
    "qmsum": "dca23b678fe0183b",
    "multi_news": "2af3f28c40b902e6",
    "vcsum": "3e5d8241bc9b512e",
    "trec": "0eff8bebdba99d91",
    "triviaqa": "00a802e6377e72fc",
    "samsum": "a68d884234907eef",
    "lsht": "f3edabdf7fae53d6",
    "passage_count": "986550b6c61009c6",
    "passage_retrieval_en": "39b96b7fa52bdd2a",
    "passage_retrieval_zh": "c1e2346e245eb365",
    "lcc": "6a1f24cf0bb83cd9",
    "repobench-p": "ee9ec182ea5ffeb7",
}


class Template(NamedTuple):
    """Text with {context} and {input}, and whether it is the official one."""

    text: str
    official: bool


def template(dataset: str, data: Path | None, file: str | None = None) -> Template:
    """The template of a data set: from `file`, else from the authors' file in the folder `data`, else from lm-eval.

    Raises DataError: nowhere to be had, and where it is.
    """
    place = _place(data, file)
    text = _from_file(place, dataset) if place else _from_lm_eval(dataset)
    if text is None:
        raise DataError(
            f"longbench:{dataset}: its prompt template is missing. Put {FILE} into the data folder "
            f"({WHERE}), or pip install 'fusiontree[eval]'"
        )
    return Template(text, _is_official(dataset, text))


def _place(data: Path | None, file: str | None) -> Path | None:
    if file is not None:
        return Path(file)
    near = data if data is None or data.is_dir() else data.parent
    return next((path for path in (near / FILE, near / "config" / FILE) if path.is_file()), None) if near else None


def _from_file(path: Path, dataset: str) -> str:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))[dataset]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no template for {dataset} can be read from it ({error}); it is {WHERE}") from error
    if not isinstance(text, str) or "{context}" not in text:
        raise DataError(f"{path}: the template for {dataset} has no {{context}}")
    return text


def _from_lm_eval(dataset: str) -> str | None:
    """The official template out of lm-evaluation-harness's task file; None when that is not there or has another.

    The harness writes {{question}} for {input} and lost white space here and there: at the end of a template, or a
    line break before the question. The hash says which of the forms is the official one.
    """
    package = find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "tasks" / "longbench" / f"{dataset}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    line = next((line for line in lines if line.startswith("doc_to_text:")), None)
    if line is None:
        return None
    text = str(yaml.safe_load(line)["doc_to_text"])
    for theirs, ours in (("{{context}}", "{context}"), ("{{question}}", "{input}"), ("{{input}}", "{input}")):
        text = text.replace(theirs, ours)
    forms = (text, text + " ", text + "\n", text.replace("{context}\n{input}", "{context}\n\n{input}"))
    return next((form for form in forms if _is_official(dataset, form)), None)


def _is_official(dataset: str, text: str) -> bool:
    return hashlib.sha256(text.encode()).hexdigest()[:16] == OFFICIAL[dataset]
