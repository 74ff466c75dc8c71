"""LongBench v2: 503 questions with four answers each, https://arxiv.org/abs/2412.15204, docs/eval-text.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fusiontree.errors import DataError
from fusiontree.eval.metrics.choices import stated_letter
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.fit import prompt_limit, room_for, shortened, without_middle
from fusiontree.eval.tasks.records import Record, Source, from_hub, read_records

REPOSITORY = "THUDM/LongBench-v2"
FIELDS = ("_id", "difficulty", "length", "question", "context", "answer", *(f"choice_{letter}" for letter in "ABCD"))
TOKENS = 128
PLACES = {"$DOC$": "context", "$Q$": "question", **{f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}}
# Ours; the authors' is prompts/0shot.txt of https://github.com/THUDM/LongBench, for --option template=FILE.
TEMPLATE = """Text:

$DOC$

Question on the text above: $Q$
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Answer in this form, with the letter of the right choice: "The correct answer is (letter)"."""


class LongBenchV2:
    """Accuracy of the stated letter, by difficulty and length."""

    name = "longbench_v2"
    version = 1
    main_metric = "accuracy"

    def samples(self, text: TokenText, settings: TaskSettings) -> Iterator[Sample]:
        """One per question, in the file's order, the middle of its prompt left out where it is too long."""
        form = _template(settings.options.get("template"))
        source = Source("data", FIELDS, _where(), lambda: from_hub(REPOSITORY, split="train"))
        records = read_records(source, settings.data)
        room = room_for(text, TOKENS)
        limit = prompt_limit(settings, room)
        for record in islice(records, settings.limit):
            cut = partial(without_middle, text, _filled(form, record))
            yield Sample(
                id=str(record["_id"]),
                prompt=shortened(text, cut, limit, room, chat=True),
                references=(record["answer"],),
                max_new_tokens=TOKENS,
                facts={"difficulty": record["difficulty"], "length": record["length"]},
                chat=True,
            )

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """1 for the right letter."""
        return {"accuracy": float(stated_letter(output) == sample.references[0])}

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Percent with one decimal, of all and of each group that has questions."""
        groups = {"accuracy": list(scored)}
        for fact in ("difficulty", "length"):
            for each in scored:
                groups.setdefault(each.sample.facts[fact], []).append(each)
        metrics = {
            name: round(100 * sum(each.scores["accuracy"] for each in group) / len(group), 1)
            for name, group in groups.items()
        }
        return {"metrics": metrics, "tables": {"groups": {name: len(group) for name, group in groups.items()}}}


def _filled(form: str, record: Record) -> str:
    for place, field in PLACES.items():
        form = form.replace(place, record[field].strip())
    return form


def _template(file: str | None) -> str:
    if file is None:
        return TEMPLATE
    try:
        form = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--option template={file}: cannot be read: {error}") from error
    missing = [place for place in PLACES if place not in form]
    if missing:
        raise DataError(f"--option template={file}: has no {', '.join(missing)}")
    return form


def _where() -> str:
    return f"https://huggingface.co/datasets/{REPOSITORY} (data.json)"


FAMILY = Family(
    name="longbench_v2",
    about="LongBench v2: 503 hard questions with four answers each",
    make=lambda member: LongBenchV2(),
    reads=("limit", "data"),
    options={
        "prompt_tokens": "tokens a prompt may have before its middle is cut",
        "template": "file with the prompt, instead of our words (the authors': prompts/0shot.txt)",
    },
)
