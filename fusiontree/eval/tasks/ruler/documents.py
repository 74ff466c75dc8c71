"""Question answering among distracting documents, from the official files of SQuAD (qa_1) and HotpotQA (qa_2)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fusiontree.data.shuffle import Draw
from fusiontree.errors import DataError
from fusiontree.eval.tasks.ruler.maker import Question, wording


@dataclass(frozen=True)
class Asked:
    """A question, the answers that count, the documents it needs and others of the same article, by number."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """All questions and documents of a file."""

    questions: tuple[Asked, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Official:
    """An official file: its names on disk and where it is to be had."""

    names: tuple[str, ...]
    source: str


OFFICIAL = {
    "qa_1": Official(
        ("dev-v2.0.json", "squad.json"), "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"
    ),
    "qa_2": Official(
        ("hotpot_dev_distractor_v1.json", "hotpotqa.json"),
        "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
    ),
}


@dataclass(frozen=True)
class DocumentMaker:
    """Questions in the order of the file; sizes in documents."""

    corpus: Corpus

    @property
    def smallest(self) -> int:
        """The documents that the neediest question needs."""
        return max(len(asked.documents) for asked in self.corpus.questions)

    @property
    def most(self) -> float:
        """Those of the file."""
        return len(self.corpus.questions)

    def question(self, draw: Draw, size: int, index: int) -> Question:
        """What is needed, then others of the same article, then any, shuffled; all repeated where they do not fill."""
        asked = self.corpus.questions[index]
        total = len(self.corpus.documents)
        if size < total:
            chosen = self._chosen(draw, asked, size)
        else:
            chosen = [number % total for number in range(size)]
        order = draw.shuffled(chosen)
        context = "\n\n".join(f"Document {n}:\n{self.corpus.documents[number]}" for n, number in enumerate(order, 1))
        places = [100 * place / size for place, number in enumerate(order) if number in asked.documents]
        text, lead = wording("qa").fill(context, query=asked.query)
        return Question(text, lead, asked.answers, {"depths": [round(place, 1) for place in places]})

    def _chosen(self, draw: Draw, asked: Asked, size: int) -> list[int]:
        missing = size - len(asked.documents)
        related = draw.sample(asked.related, min(missing, len(asked.related)))
        near = {*asked.documents, *asked.related}
        others = [number for number in range(len(self.corpus.documents)) if number not in near]
        return [*asked.documents, *related, *draw.sample(others, min(missing - len(related), len(others)))]


@cache
def load_corpus(name: str, data: Path | None) -> Corpus:
    """The corpus of qa_1 or qa_2 from its official JSON file. Raises DataError: where to get it, or what is wrong."""
    official = OFFICIAL[name]
    found = [] if data is None else [data] if data.is_file() else [data / file for file in official.names]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise DataError(f"needs {official.names[0]}, itself or in the folder of --data; it is at {official.source}")
    try:
        content = json.loads(path.read_text("utf-8"))
        corpus = _squad(content) if name == "qa_1" else _hotpot(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: is not {official.names[0]} ({type(error).__name__}: {error})") from error
    if not corpus.questions:
        raise DataError(f"{path}: no question in it")
    return corpus


def _squad(content: dict[str, Any]) -> Corpus:
    """Paragraphs are documents; questions that have no answer are left out."""
    texts = sorted({paragraph["context"] for article in content["data"] for paragraph in article["paragraphs"]})
    number = {text: index for index, text in enumerate(texts)}
    questions = []
    for article in content["data"]:
        related = list(dict.fromkeys(number[paragraph["context"]] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            for item in paragraph["qas"]:
                if not item.get("is_impossible"):
                    answers = tuple(answer["text"] for answer in item["answers"])
                    others = tuple(other for other in related if other != own)
                    questions.append(Asked(item["question"], answers, (own,), others))
    return Corpus(tuple(questions), tuple(texts))


def _hotpot(content: list[dict[str, Any]]) -> Corpus:
    """A document is a title and its sentences; each question comes with ten of them."""

    def document(title: str, parts: list[str]) -> str:
        return f"{title}\n{''.join(parts)}"

    texts = sorted({document(*page) for item in content for page in item["context"]})
    number = {text: index for index, text in enumerate(texts)}
    questions = [
        Asked(item["question"], (item["answer"],), tuple(dict.fromkeys(number[document(*p)] for p in item["context"])))
        for item in content
    ]
    return Corpus(tuple(questions), tuple(texts))
