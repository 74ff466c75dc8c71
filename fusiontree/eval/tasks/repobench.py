"""RepoBench v1.1: the next line of a file, given snippets of other files: https://arxiv.org/abs/2306.03091."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.metrics.code import repobench_line, same_code
from fusiontree.eval.metrics.edit import edit_similarity
from fusiontree.eval.registry import Family
from fusiontree.eval.task import Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.fit import room_for, shortened, without_start
from fusiontree.eval.tasks.options import one_of
from fusiontree.eval.tasks.records import Record, Source, from_hub, read_records

SETTINGS = ("cross_file_first", "cross_file_random", "in_file")
LEVELS = ("2k", "4k", "8k", "12k", "16k", "24k", "32k", "64k", "128k")
DEFAULT_LEVELS = LEVELS[:5]
DEFAULT_DATES = "2023-12-01..2023-12-31"
FIELDS = (
    "repo_name",
    "file_path",
    "context",
    "import_statement",
    "cropped_code",
    "next_line",
    "level",
    "created_at",
)
PROMPT_TOKENS = 15_800
ANSWER_TOKENS = 128
COMMENTS = {"python": "#", "java": "//"}
MANY_BLANK_LINES = re.compile(r"\n{4,}")


class RepoBench:
    """Exact match and edit similarity of the next line, per setting and level."""

    version = 1
    main_metric = "edit_similarity"

    def __init__(self, language: str) -> None:
        self.language = language
        self.name = f"repobench:{language}"

    def samples(self, text: TokenText, settings: TaskSettings) -> Iterator[Sample]:
        """The settings' records in turn, so that a limit takes equally many of each."""
        room = room_for(text, ANSWER_TOKENS)
        keep_end = one_of(settings, "overlong", ("refuse", "keep_end")) == "keep_end"
        limit = min(PROMPT_TOKENS, room)
        lists = [self._records(name, settings) for name in _several(settings, "settings", SETTINGS, SETTINGS)]
        turns = chain.from_iterable(zip_longest(*lists))
        for name, number, record in islice((turn for turn in turns if turn), settings.limit):
            prompt, cut = self._prompt(record, text, limit, room, keep_end)
            yield Sample(
                id=f"{name}/{number}",
                prompt=prompt,
                references=(record["next_line"],),
                max_new_tokens=ANSWER_TOKENS,
                facts={"setting": name, "level": record["level"], "own part cut": cut},
            )

    def _prompt(self, record: Record, text: TokenText, limit: int, room: int, keep_end: bool) -> tuple[str, bool]:
        """The prompt, and whether even the file's own part had to be cut."""
        bare = "\n\n" + own_part(record, self.language)
        if text.count(bare) <= room:
            return shortened(text, lambda n: build_prompt(record, self.language, text, n), limit, room, False), False
        if not keep_end:
            raise DataError(
                f"{self.name}: {record['file_path']} has {text.count(bare)} tokens before the line asked for, the "
                f"model takes {room}; RepoBench never cuts these: --option levels= with smaller ones, or "
                "--option overlong=keep_end"
            )
        return shortened(text, lambda n: without_start(text, bare, n), room, room, False), True

    def _records(self, name: str, settings: TaskSettings) -> list[tuple[str, int, Record]]:
        """(setting, number, record) of the levels and dates asked for."""
        repository = f"tianyang/repobench_{self.language}_v1.1"
        where = f"https://huggingface.co/datasets/{repository}"
        source = Source(name, FIELDS, where, lambda: from_hub(repository, split=name))
        data = settings.data
        if data is not None and (data / self.language).is_dir():
            data = data / self.language
        levels = _several(settings, "levels", LEVELS, DEFAULT_LEVELS)
        start, end = _dates(settings)
        records = [
            record
            for record in read_records(source, data)
            if record["level"] in levels and start <= _moment(record["created_at"]) <= end
        ]
        if not records:
            raise DataError(f"{self.name}: {name} has no records of the levels {', '.join(levels)} and dates asked for")
        return [(name, number, record) for number, record in enumerate(records)]

    def score(self, sample: Sample, output: str) -> dict[str, float]:
        """Exact match 0 or 1, edit similarity 0 … 100, of the first line that is code."""
        return line_scores(output, sample.references[0], self.language)

    def summarise(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Percent per setting, rounded as by the authors; the total weights the settings by their samples."""
        return summary(scored, "setting", "level")


def line_scores(output: str, gold: str, language: str) -> dict[str, float]:
    """What the first line that is code is worth."""
    line = repobench_line(output, language)
    return {"exact_match": same_code(line, gold), "edit_similarity": float(edit_similarity(line, gold))}


def summary(scored: Sequence[Scored], group: str, *breakdowns: str) -> dict[str, Any]:
    """Metrics of all and of each value of the fact `group`; a table for each further fact. DataError when empty."""
    if not scored:
        raise DataError("nothing was scored")
    rows = _rows(scored, group)
    total = {
        name: round(sum(row[name] * row["samples"] for row in rows) / len(scored), 2)
        for name in ("exact_match", "edit_similarity")
    }
    parts = {f"{row[group]}/{name}": row[name] for row in rows for name in total}
    return {"metrics": total | parts, "tables": {name: _rows(scored, name) for name in (group, *breakdowns)}}


def _rows(scored: Sequence[Scored], fact: str) -> list[dict[str, Any]]:
    groups: dict[Any, list[Scored]] = {}
    for each in scored:
        groups.setdefault(each.sample.facts[fact], []).append(each)
    return [
        {
            fact: value,
            "samples": len(group),
            "exact_match": round(round(_mean(group, "exact_match"), 5) * 100, 2),
            "edit_similarity": round(round(_mean(group, "edit_similarity"), 5), 2),
        }
        for value, group in groups.items()
    ]


def _mean(scored: Sequence[Scored], name: str) -> float:
    return sum(each.scores[name] for each in scored) / len(scored)


def build_prompt(record: Record, language: str, text: TokenText, limit: int) -> str:
    """Snippets of other files, then the file up to the line asked for; lines go from the snippets' end.

    The file's own part is never cut. A line dropped is counted with what the tokenizer puts around a text (BOS), its
    line break is not: as by the authors.
    """
    sign = COMMENTS[language]
    parts = [f"{sign} Path: {snippet['path']}\n{snippet['snippet']}\n\n" for snippet in record["context"]]
    others = f"{sign} Repo Name: {record['repo_name']}\n" + "".join(parts)
    own = own_part(record, language)
    over = text.count(others) + text.count(own) - limit
    if over > 0:
        lines = others.split("\n")
        while lines and over >= 0:
            over -= text.count(lines.pop())
        others = "\n".join(lines) + "\n\n"
    return MANY_BLANK_LINES.sub("\n\n", others + own)


def own_part(record: Record, language: str) -> str:
    """The file up to the line asked for."""
    code = f"{record['import_statement']}\n{record['cropped_code'].rstrip()}\n"
    return f"{COMMENTS[language]} Path: {record['file_path']}\n{code}"


def _several(settings: TaskSettings, key: str, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    chosen = [name for name in settings.options.get(key, ",".join(default)).split(",") if name]
    if not chosen or not set(chosen) <= set(allowed):
        raise ConfigError(f"--option {key}={settings.options.get(key)}: allowed, with commas: {', '.join(allowed)}")
    return chosen


def _dates(settings: TaskSettings) -> tuple[str, str]:
    said = settings.options.get("dates", DEFAULT_DATES)
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)\.\.(\d{4}-\d\d-\d\d)", said)
    if not found:
        raise ConfigError(f"--option dates={said}: allowed: YYYY-MM-DD..YYYY-MM-DD")
    return f"{found.group(1)} 00:00:00", f"{found.group(2)} 00:00:00"  # the last day's midnight, as by the authors


def _moment(created: Any) -> str:
    """YYYY-MM-DD hh:mm:ss of a record's time stamp, a string or a datetime in UTC."""
    return str(created).replace("T", " ")[:19]


FAMILY = Family(
    name="repobench",
    about="RepoBench v1.1: the next line of a file, given snippets of the repository's other files",
    make=RepoBench,
    members=tuple(COMMENTS),
    reads=("limit", "data"),
    options={
        "settings": f"with commas, of {', '.join(SETTINGS)} (default: all)",
        "levels": f"with commas, of {', '.join(LEVELS)} (default: {','.join(DEFAULT_LEVELS)})",
        "dates": f"first..last day a record was made (default {DEFAULT_DATES})",
        "overlong": "a file too long for the model: refuse (default) or keep_end",
    },
)
