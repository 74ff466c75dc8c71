"""LongBench (21 tasks) and LongBench-E (13, by length): https://arxiv.org/abs/2308.14508, docs/eval-text.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from fusiontree.errors import DataError
from fusiontree.eval.groups import macro_average
from fusiontree.eval.metrics.choices import classification, retrieval, share_of_numbers
from fusiontree.eval.metrics.code import longbench_line
from fusiontree.eval.metrics.edit import edit_similarity, edit_similarity_difflib
from fusiontree.eval.metrics.rouge import rouge_l, rouge_l_zh
from fusiontree.eval.metrics.words import qa_f1, qa_f1_zh
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.fit import prompt_limit, room_for, shortened, without_middle
from fusiontree.eval.tasks.longbench_prompts import template
from fusiontree.eval.tasks.options import one_of
from fusiontree.eval.tasks.records import Record, Source, from_hub, read_records

REPOSITORY = "THUDM/LongBench"
WHERE = f"https://huggingface.co/datasets/{REPOSITORY} (data.zip)"
FIELDS = ("input", "context", "answers", "length", "all_classes")
EDIT = {"levenshtein": edit_similarity, "difflib": edit_similarity_difflib}
OPTIONS = {
    "prompt_tokens": "tokens a prompt may have before its middle is cut (the authors: 3500 of 4k, 31500 of 32k)",
    "templates": "JSON file, data set -> prompt with {context} and {input}, instead of the authors'",
    "edit": f"similarity of code: {' (default) or '.join(EDIT)}",
}
BUCKETS = ("0-4k", "4-8k", "8k+")  # by `length` in words or characters, the bounds 4,000 and 8,000
# (answer, reference, facts of the sample) -> 0 … 1
Metric = Callable[[str, str, Mapping[str, Any]], float]


def _class_score(answer: str, reference: str, facts: Mapping[str, Any]) -> float:
    return classification(answer, reference, facts["classes"], facts["official"])


def _code_score(answer: str, reference: str, facts: Mapping[str, Any]) -> float:
    return EDIT[facts["edit"]](longbench_line(answer), reference) / 100


def _plain(metric: Callable[[str, str], float]) -> Metric:
    return lambda answer, reference, facts: metric(answer, reference)


F1, F1_ZH = _plain(qa_f1), _plain(qa_f1_zh)
ROUGE, ROUGE_ZH = _plain(rouge_l), _plain(rouge_l_zh)


@dataclass(frozen=True)
class Rules:
    """How one data set is asked and scored."""

    metric: Metric
    tokens: int  # of the answer
    first_line: bool = False  # only the first line of the answer counts, after leading line breaks
    chat: bool = True
    one_line: bool = False  # writing stops at a line break, of which there is none at the beginning


RULES: dict[str, Rules] = {
    "narrativeqa": Rules(F1, 128),
    "qasper": Rules(F1, 128),
    "multifieldqa_en": Rules(F1, 64),
    "multifieldqa_zh": Rules(F1_ZH, 64),
    "hotpotqa": Rules(F1, 32),
    "2wikimqa": Rules(F1, 32),
    "musique": Rules(F1, 32),
    "dureader": Rules(ROUGE_ZH, 128),
    "gov_report": Rules(ROUGE, 512),
    "qmsum": Rules(ROUGE, 512),
    "multi_news": Rules(ROUGE, 512),
    "vcsum": Rules(ROUGE_ZH, 512),
    "trec": Rules(_class_score, 64, first_line=True, chat=False),
    "triviaqa": Rules(F1, 32, first_line=True, chat=False),
    "samsum": Rules(ROUGE, 128, first_line=True, chat=False, one_line=True),
    "lsht": Rules(_class_score, 64, first_line=True, chat=False),
    "passage_count": Rules(_plain(share_of_numbers), 32),
    "passage_retrieval_en": Rules(_plain(partial(retrieval, word="Paragraph ")), 32),
    "passage_retrieval_zh": Rules(_plain(partial(retrieval, word="段落")), 32),
    "lcc": Rules(_code_score, 64, chat=False),
    "repobench-p": Rules(_code_score, 64, chat=False),
}
EXTENDED = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip


class LongBench:
    """One data set of LongBench, or of LongBench-E with `extended`."""

    version = 1
    main_metric = "score"

    def __init__(self, dataset: str, extended: bool = False) -> None:
        self.dataset, self.extended = dataset, extended
        self.rules = RULES[dataset]
        self.name = f"longbench{'_e' if extended else ''}:{dataset}"

    def samples(self, text: TokenText, settings: TaskSettings) -> Iterator[Sample]:
        """One per record, in the file's order, the middle of its prompt left out where it is too long."""
        facts = _settings_facts(settings)
        form = template(self.dataset, settings.options.get("templates"))
        file = self.dataset + ("_e" if self.extended else "")
        records = read_records(Source(file, FIELDS, WHERE, lambda: from_hub(REPOSITORY, file)), settings.data)
        room = room_for(text, self.rules.tokens)
        limit = prompt_limit(settings, room)
        for number, record in enumerate(islice(records, settings.limit)):
            whole = form.filled(record["context"], record["input"])
            cut = partial(without_middle, text, whole)
            prompt = shortened(text, cut, limit, room, self.rules.chat)
            yield Sample(
                id=str(number),
                prompt=prompt,
                references=tuple(record["answers"]),
                max_new_tokens=self.rules.tokens,
                stop=("\n",) if self.rules.one_line else (),
                facts={**facts, **_record_facts(record), "template": form.official, "cut": prompt != whole},
                chat=self.rules.chat,
                never_empty=self.rules.one_line,
            )

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """The best over all gold answers."""
        if self.rules.first_line:
            output = output.lstrip("\n").split("\n")[0]
        scores = (self.rules.metric(output, gold, sample.facts) for gold in sample.references)
        return {"score": max(scores, default=0.0)}

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Mean x 100 with two decimals; LongBench-E also by length, null for a length without samples."""
        metrics: dict[str, float | None] = {"score": _percent(scored)}
        tables: dict[str, Any] = {"prompts": _prompt_table(scored)}
        if self.extended:
            rows = []
            for name in BUCKETS:
                group = [each for each in scored if bucket(each.sample.facts) == name]
                metrics[name] = _percent(group)
                rows.append({"length": name, "samples": len(group), "score": metrics[name]})
            tables["lengths"] = rows
        return {"metrics": metrics, "tables": tables}


def bucket(facts: Mapping[str, Any]) -> str:
    """LongBench-E's group of a sample."""
    return BUCKETS[0] if facts["length"] < 4000 else BUCKETS[1] if facts["length"] < 8000 else BUCKETS[2]


def _percent(scored: Sequence[Scored]) -> float | None:
    if not scored:
        return None
    return round(100 * sum(each.scores["score"] for each in scored) / len(scored), 2)


def _prompt_table(scored: Sequence[Scored]) -> dict[str, Any]:
    """What a reader must know before comparing: were the prompts the official ones, how many were cut."""
    return {
        "official templates": all(each.sample.facts["template"] for each in scored),
        "cut in the middle": sum(each.sample.facts["cut"] for each in scored),
        "samples": len(scored),
    }


def _settings_facts(settings: TaskSettings) -> dict[str, Any]:
    return {"official": settings.official, "edit": one_of(settings, "edit", tuple(EDIT))}


def _record_facts(record: Record) -> dict[str, Any]:
    if not isinstance(record["answers"], list) or not isinstance(record["length"], int):
        raise DataError("longbench: `answers` must be a list and `length` a number; it is not the official file")
    return {"length": record["length"], "classes": record["all_classes"] or [], "record": record.get("_id")}


# As the tables of the paper and the README have them; the code tasks count in both languages.
CATEGORIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic tasks": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code completion": ("lcc", "repobench-p"),
}
CHINESE = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}


def overall(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The published averages: of the categories' means, for English, Chinese and all tasks."""
    scores = {name.partition(":")[2]: result["metrics"]["score"] for name, result in results.items()}
    code = CATEGORIES["code completion"]
    languages = {
        "all": scores,
        "english": {name: score for name, score in scores.items() if name not in CHINESE},
        "chinese": {name: score for name, score in scores.items() if name in CHINESE or name in code},
    }
    found = {language: macro_average(some, CATEGORIES) for language, some in languages.items()}
    return {
        "metrics": {language: average["average"] for language, average in found.items()},
        "tables": {language: average["categories"] for language, average in found.items()},
    }


def overall_by_length(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """LongBench-E: the same average at each length and of all samples."""
    found = {}
    for part in ("score", *BUCKETS):
        scores = {name.partition(":")[2]: result["metrics"][part] for name, result in results.items()}
        found[part] = macro_average(scores, CATEGORIES)
    return {
        "metrics": {part: average["average"] for part, average in found.items()},
        "tables": {part: average["categories"] for part, average in found.items()},
    }


FAMILY = Family(
    name="longbench",
    about="LongBench: 21 tasks in English, Chinese and code, the official metrics",
    make=LongBench,
    members=tuple(RULES),
    reads=("limit", "data", "official"),
    options=OPTIONS,
    overall=overall,
)
FAMILY_E = Family(
    name="longbench_e",
    about="LongBench-E: 13 of the tasks with even lengths, scores by length",
    make=partial(LongBench, extended=True),
    members=EXTENDED,
    reads=("limit", "data", "official"),
    options=OPTIONS,
    overall=overall_by_length,
)
