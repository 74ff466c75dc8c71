"""L-Eval: seven closed tasks by exact match, thirteen open ones by F1 or ROUGE: https://arxiv.org/abs/2307.11088.

Scores and truncation are the authors'; the words around document and question are ours (docs/eval-text.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fusiontree.errors import DataError
from fusiontree.eval.metrics import leval as rules
from fusiontree.eval.metrics.rouge import google_rouge
from fusiontree.eval.metrics.words import qa_f1
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.fit import room_for, shortened
from fusiontree.eval.tasks.options import whole_number
from fusiontree.eval.tasks.records import Record, Source, from_hub, read_records

REPOSITORY = "L4NLP/LEval"
WHERE = "https://github.com/OpenLMLab/LEval (folder LEval-data)"
FIELDS = ("instructions", "outputs", "input", "evaluation")
ANSWER_TOKENS = 512
STEP = 250  # words

OPTIONS_ONE = "Each question has one right option. Answer with its letter alone."
OPTIONS_MANY = "A question may have one right option or several. Answer with the letters alone, like A or AB."
OPEN = "Read the document, then do what the instruction after it asks."
IN_STORY = "based on the world described in the document."
IN_FACT = "based on what is known of the real world."


@dataclass(frozen=True)
class Closed:
    """How a closed task is asked and what of answer and gold is compared."""

    lead: str  # before the document
    answer: Callable[[str, str, bool], str]  # (output, gold as in the file, official) -> what is compared
    gold: Callable[[str], str]
    ask: str = "{lead}\n\nDocument:\n{document}\n\nQuestion: {question}\nGive the answer only, no explanation.\nAnswer:"


CONTINUED = "{lead}\n\n{document}\n\n{question}"  # the document is itself a list of questions, code or a conversation
CLOSED = {
    "coursera": Closed(OPTIONS_MANY, lambda out, gold, ok: rules.chosen_letters(out, ok), rules.gold_letters),
    "quality": Closed(OPTIONS_ONE, lambda out, gold, ok: rules.chosen_letter(out, ok), rules.gold_letters),
    "tpo": Closed(OPTIONS_ONE, lambda out, gold, ok: rules.chosen_letter(out, ok), rules.gold_letters),
    "gsm100": Closed(
        f"Answer the last question as the ones before it are answered, and end with: {rules.LEAD} NUMBER.",
        lambda out, gold, ok: rules.stated_number(out),
        rules.stated_number,
        CONTINUED,
    ),
    "codeU": Closed(
        "Here is a code base of functions with comments. Read it, then say what the call at the end gives.",
        lambda out, gold, ok: rules.stated_output(out, gold),
        rules.plain_code,
        CONTINUED,
    ),
    "topic_retrieval_longchat": Closed(
        "Here is our conversation so far, about one topic after the other. Remember the topics and their order.",
        lambda out, gold, ok: out,
        str,
        CONTINUED,
    ),
    "sci_fi": Closed("Answer each question with True or False.", lambda out, gold, ok: rules.truth(out), str),
}
PLACES = ("first", "second", "third")  # of a topic in a conversation
OPEN_METRICS = {
    "financial_qa": "f1",
    "gov_report_summ": "rouge",
    "legal_contract_qa": "f1",
    "meeting_summ": "rouge",
    "multidoc_qa": "f1",
    "narrative_qa": "f1",
    "natural_question": "f1",
    "news_summ": "rouge",
    "paper_assistant": "rouge",
    "patent_summ": "rouge",
    "review_summ": "rouge",
    "scientific_qa": "f1",
    "tv_show_summ": "rouge",
}
OPEN_ASK = (
    "{lead}\n\nDocument:\n{document}\n\nInstruction: {question}\nAnswer this question with {words} words.\nAnswer:"
)


@dataclass(frozen=True)
class Question:
    """One question of a task, before it is cut to a model's length."""

    id: str
    document: str
    ask: str  # with the place {document}; lead and question are in
    gold: str
    part: str | None = None  # scored apart from the other parts, then averaged


class LEval:
    """One task of L-Eval."""

    version = 1

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.name = f"leval:{dataset}"
        self.closed = CLOSED.get(dataset)
        self.main_metric = "exact" if self.closed else OPEN_METRICS[dataset]

    def samples(self, text: TokenText, settings: TaskSettings) -> Iterator[Sample]:
        """One per question, the document cut by 250 words at a time until the prompt fits."""
        hub = {"name": self.dataset, "split": "test", "revision": "refs/convert/parquet"}
        source = Source(self.dataset, FIELDS, WHERE, lambda: from_hub(REPOSITORY, **hub))
        records = read_records(source, settings.data)
        tokens = whole_number(settings, "answer_tokens", ANSWER_TOKENS)
        room = room_for(text, tokens)
        for question in islice(self._questions(records), settings.limit):
            yield Sample(
                id=question.id,
                prompt=_fitted(text, question, room, from_left=self.dataset == "codeU"),
                references=(question.gold,),
                max_new_tokens=tokens,
                facts={"part": question.part, "official": settings.official},
                chat=True,
            )

    def _questions(self, records: Sequence[Record]) -> Iterator[Question]:
        kind = "exam" if self.closed else self.main_metric
        number = 0
        for index, record in enumerate(records):
            if record["evaluation"] != kind:  # the others need a judge
                continue
            for place, (asked, gold) in enumerate(zip(record["instructions"], record["outputs"], strict=True)):
                yield from self._asked(f"{index}.{place}", record["input"], asked, str(gold), number)
                number += 1

    def _asked(self, name: str, document: str, asked: str, gold: str, number: int) -> Iterator[Question]:
        if self.closed is None:
            words = str(len(gold.split()))
            yield Question(name, document, _filled(OPEN_ASK, lead=OPEN, question=asked, words=words), gold)
            return
        ask = _filled(self.closed.ask, lead=self.closed.lead, question=asked)
        if self.dataset == "topic_retrieval_longchat":
            yield Question(name, document, ask, gold, PLACES[number % 3])
        elif self.dataset == "sci_fi":
            story, _, fact = gold.lower().partition("[fact:")
            yield Question(f"{name}.loyalty", document, ask, story.strip(), "loyalty")
            bare = f"{self.closed.lead}\n\n{asked.replace(IN_STORY, IN_FACT)}\nAnswer:"
            yield Question(f"{name}.fact", "", bare, fact.strip()[:-1].strip(), "fact")
        else:
            yield Question(name, document, ask, gold)

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """Closed: exact 1, 0.25 or 0. Open: F1, or three ROUGE F, 0 … 1."""
        gold = sample.references[0]
        if self.closed:
            given = self.closed.answer(output, gold, bool(sample.facts["official"]))
            return {"exact": rules.exact(given, self.closed.gold(gold))}
        if self.main_metric == "f1":
            return {"f1": qa_f1(output, gold)}
        return google_rouge(output, gold)

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Percent. Parts are averaged apart, then together; `rouge` is the geometric mean of the three."""
        if not scored:
            raise DataError(f"{self.name}: nothing was scored")
        means = {name: _mean(scored, name) for name in scored[0].scores}
        if self.main_metric == "rouge":
            means["rouge"] = (means["rouge1"] * means["rouge2"] * means["rougeL"]) ** (1 / 3)
        parts = {part: [s for s in scored if s.sample.facts["part"] == part] for part in _parts(scored)}
        if parts:
            each = {part: _mean(group, "exact") for part, group in parts.items()}
            means = {"exact": sum(each.values()) / len(each), **each}
        metrics = {name: round(value, 2) for name, value in means.items()}
        return {"metrics": metrics, "tables": {"samples": {part: len(group) for part, group in parts.items()}}}


def _parts(scored: Sequence[Scored]) -> list[str]:
    """The parts there are, in the order they come."""
    return list(dict.fromkeys(each.sample.facts["part"] for each in scored if each.sample.facts["part"]))


def _mean(scored: Sequence[Scored], name: str) -> float:
    return 100 * sum(each.scores[name] for each in scored) / len(scored)


def _filled(form: str, **values: str) -> str:
    """The form with these places filled; {document} and braces in the values stay."""
    for name, value in values.items():
        form = form.replace(f"{{{name}}}", value)
    return form


def _fitted(text: TokenText, question: Question, room: int, from_left: bool) -> str:
    before, _, after = question.ask.partition("{document}")
    if not question.document:
        return shortened(text, lambda limit: question.ask, 1, room, chat=True)
    frame = text.count(text.chat(before + after))
    return shortened(
        text,
        lambda limit: before + shorter_document(text, question.document, limit, from_left) + after,
        room - frame,
        room,
        chat=True,
    )


def shorter_document(text: TokenText, document: str, limit: int, from_left: bool = False) -> str:
    """The document, or of one longer than `limit` tokens its first `limit`, `limit` - 250 … words that fit.

    The number of words starts at the number of tokens allowed, as in the authors' scripts. `from_left` keeps the
    last words instead. DataError when no such number of words fits.
    """
    words = document.split(" ")
    count = limit
    while text.count(document) > limit:
        if count <= 0:
            raise DataError(f"a document of {len(words)} words does not fit into {limit} tokens, 250 words at a time")
        document = " ".join(words[-count:] if from_left else words[:count])
        count -= STEP
    return document


def overall(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over the tasks of a kind: closed ones (exact), F1, ROUGE (geometric mean of three)."""
    rows = []
    for kind in ("exact", "f1", "rouge"):
        scores = [result["metrics"][kind] for result in results.values() if result["main_metric"] == kind]
        if scores:
            rows.append({"metric": kind, "score": round(sum(scores) / len(scores), 2), "tasks": len(scores)})
    return {"metrics": {row["metric"]: row["score"] for row in rows}, "tables": {"by_metric": rows}}


FAMILY = Family(
    name="leval",
    about="L-Eval: 7 closed tasks by exact match, 13 open ones by F1 or ROUGE",
    make=LEval,
    members=(*CLOSED, *OPEN_METRICS),
    reads=("limit", "data", "official"),
    overall=overall,
    options={"answer_tokens": f"tokens of an answer (default {ANSWER_TOKENS})"},
)
