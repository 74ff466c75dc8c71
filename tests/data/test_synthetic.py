"""Synthetic rows: right answers, the wanted share, real text untouched, the same at every visit to a position."""

from __future__ import annotations

import json
import re
from itertools import islice, pairwise
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from fusiontree.data import Batch, DataConfig, Loader, SourceConfig, build_loader, train_tokenizer
from fusiontree.data.config import SyntheticConfig, TaskName
from fusiontree.data.shuffle import Draw
from fusiontree.data.synthetic import TASKS
from fusiontree.errors import DataError

TEXTS = [f"<{index}>" + chr(97 + index % 26) * (30 + 11 * index % 170) for index in range(200)]
L = 192


@pytest.fixture
def make(jsonl, tokenizer):
    path = jsonl(TEXTS)

    def build(*, seed=0, tokenizer=tokenizer, length=L, batch=2, split="train", rank=0, world=1, **settings: Any):
        synthetic = settings.pop("synthetic", {"probability": 0.25})
        config = DataConfig(
            **{"train": [SourceConfig(path=path)], "validation_fraction": 0.0, **settings},
            synthetic=None if synthetic is None else SyntheticConfig(**synthetic),
        )
        return build_loader(config, tokenizer, split, length, batch, seed, rank, world)

    return build


def documents(batch: Batch, row: int) -> list[str]:
    """Text of each document of a row (bytes), ends included as `$`."""
    ids, positions = batch["input_ids"][row].tolist(), batch["position_ids"][row].tolist()
    starts = [index for index, position in enumerate(positions) if position == 0] + [len(ids)]
    parts = (ids[a:b] for a, b in pairwise(starts) if ids[a] != 257)
    return ["".join(chr(i) if i < 256 else "$" for i in part if i != 257) for part in parts]


def rows(loader: Loader, count: int) -> list[tuple[bool, list[str]]]:
    """(synthetic, documents) of the first rows."""
    return [
        (is_made(loader, sample), documents(batch, row))
        for batch in islice(loader, count // 2)
        for row, sample in enumerate(batch["sample_ids"])
    ]


def is_made(loader: Loader, sample: int) -> bool:
    return loader._mixture.place(sample).source == 1


def is_right(text: str) -> bool:
    kind = text.split(":")[0]
    if "Question: " in text:
        name, code = re.search(r"code of (\w{5})\? Answer: (\d{5})$", text).groups()
        return text.count(f" The code of {name} is {code}. ") == 1
    if kind == "Pairs":
        given, asked = text.removeprefix("Pairs: ").split(". Ask: ")
        return sorted(given.split()) == sorted(asked.split())
    left, _, right = text.partition(": ")[2].partition(" | ")
    if kind == "Add":
        numbers = [int(number) for number in re.findall(r"\d\d", text)]
        sums, summands = [numbers[0], *numbers[2::2]], numbers[1::2]
        return all((a + b) % 100 == c for a, b, c in zip(sums, summands, sums[1:], strict=False))
    turned = {"Copy": left, "Reverse": left[::-1], "Sort": " ".join(sorted(left.split()))}
    return right == turned[kind]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [1, 60, 333, 2000])
def test_each_task_is_right_and_as_long_as_asked(name: TaskName, size: int) -> None:
    for key in range(20):
        text = TASKS[name](Draw(key), size, lambda draw, wanted: "." * wanted)
        assert is_right(text), text
        assert len(text) <= max(size + 8, 100) and len(text) > size * 0.5


def test_every_task_has_a_name_in_the_config_and_its_example_is_right() -> None:
    assert set(TASKS) == set(get_args(TaskName))
    for task in TASKS.values():
        assert is_right(re.search(r"`(.*)`", task.__doc__ or "").group(1))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weight", [None, 2.0])
def test_the_share_is_kept(make, jsonl, packing, weight) -> None:
    source = SourceConfig(path=jsonl(TEXTS), weight=weight)
    loader = make(packing=packing, train=[source])
    size = loader.samples_per_epoch
    kinds = [is_made(loader, sample) for sample in range(size)]
    assert abs(sum(kinds) / size - 0.25) < 0.02
    if weight is None:
        assert size - sum(kinds) == make(packing=packing, synthetic=None).samples_per_epoch


def test_real_rows_are_the_same_with_and_without(make) -> None:
    mixed, alone = make(batch=1), make(batch=1, synthetic=None)
    real = [tuple(d) for batch in islice(mixed, mixed.samples_per_epoch) for d in [documents(batch, 0)]
            if not is_made(mixed, batch["sample_ids"][0])]  # fmt: skip
    assert sorted(real) == sorted(tuple(documents(batch, 0)) for batch in islice(alone, alone.samples_per_epoch))


@pytest.mark.parametrize("packing", [True, False])
def test_documents_are_whole_right_and_fill_their_row(make, packing: bool) -> None:
    loader = make(packing=packing)
    made = [texts for synthetic, texts in rows(loader, loader.samples_per_epoch) if synthetic]
    kinds = set()
    for texts in made:
        assert all(text.endswith("$") and is_right(text[:-1]) for text in texts)
        kinds |= {text.split(":")[0] if "Question" not in text else "Needle" for text in texts}
        assert not packing or L - 96 < sum(map(len, texts)) <= L
    assert kinds == {"Needle", "Pairs", "Copy", "Reverse", "Sort", "Add"}
    assert packing or all(len(texts) == 1 for texts in made)


def test_a_needle_lies_in_training_text_and_fills_the_row_with_any_tokenizer(make, jsonl, tmp_path) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    trained = train_tokenizer([source], 300, tmp_path / "t")
    loader = make(tokenizer=trained, length=400, synthetic={"probability": 0.5, "tasks": ["needle"]}, packing=False)
    held = make(tokenizer=trained, split="validation", validation_fraction=0.1)
    assert not any("synthetic" in origin for sample in range(len(held)) for origin in held.origins(sample))
    lengths = []
    for batch in islice(loader, 40):
        for row, sample in enumerate(batch["sample_ids"]):
            if is_made(loader, sample):
                assert loader.origins(sample)[0].startswith("synthetic:")
                ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
                text = trained.decode(ids, skip_special_tokens=True)
                assert is_right(text)
                hay = re.sub(r" The code of \w+ is \d+\. |\nQuestion.*", "", text)
                assert re.search(r"[a-z]{5}|<", hay)
                lengths.append(len(ids))
    assert len(lengths) > 10 and max(lengths) > 320


@pytest.mark.parametrize("packing", [True, False])
def test_resume_workers_and_ranks_change_nothing(make, packing: bool) -> None:
    loader = make(packing=packing)
    stream = iter(loader)
    first = [next(stream) for _ in range(9)]
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(stream) for _ in range(9)]
    resumed = make(packing=packing, num_workers=2)
    resumed.load_state_dict(state)
    for ours, theirs in zip(islice(resumed, 9), expected, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and ours["sample_ids"] == theirs["sample_ids"]
    if packing:
        halves = [next(iter(make(batch=1, rank=rank, world=2)))["input_ids"] for rank in range(2)]
        assert torch.equal(torch.cat(halves), first[0]["input_ids"])


def test_each_pass_and_seed_has_new_ones(make) -> None:
    loader = make()
    size = loader.samples_per_epoch
    passes = [{text for made, texts in rows_from(loader, begin, size) if made for text in texts} for begin in (0, size)]
    assert passes[0] and passes[1] and len(passes[0] & passes[1]) < 3
    other = {text for made, texts in rows_from(make(seed=1), 0, size) if made for text in texts}
    assert len(passes[0] & other) < 3


def rows_from(loader: Loader, begin: int, count: int) -> list[tuple[bool, list[str]]]:
    loader.load_state_dict({**loader.state_dict(), "position": begin})
    return rows(loader, count)


def test_another_probability_or_list_of_tasks_is_refused_at_resume(make) -> None:
    state = make().state_dict()
    for synthetic in (None, {"probability": 0.3}, {"probability": 0.25, "tasks": ["add"]}):
        with pytest.raises(DataError, match="fingerprint"):
            make(synthetic=synthetic).load_state_dict(state)


@pytest.mark.parametrize("settings", [{}, {"probability": 0.0}, {"probability": 1.0}, {"probability": 0.1, "tasks": []},
                                      {"probability": 0.1, "tasks": ["sing"]}])  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SyntheticConfig(**settings)


def test_short_rows_and_draws_that_never_change(make) -> None:
    for batch in islice(make(length=8, synthetic={"probability": 0.5}), 20):
        assert batch["input_ids"].shape == (2, 8)
    draw = Draw(7)
    assert [draw.below(1000) for _ in range(5)] == [389, 16, 900, 582, 452]
