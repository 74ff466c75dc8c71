"""Length curriculum: tokens per step stay, and no token of the stream is lost or repeated, whatever happens."""

from __future__ import annotations

import json
import random
from itertools import islice
from typing import Any

import pytest

from fusiontree.data import DataConfig, Loader, SourceConfig, build_loader, plan_stages, stage_at
from fusiontree.data.config import SyntheticConfig
from fusiontree.data.curriculum import PRESETS
from fusiontree.data.rows import Part
from fusiontree.errors import ConfigError, DataError

TEXTS = [f"<{index}>" + chr(97 + index % 26) * (3 + 37 * index % 190) for index in range(60)]
LONGEST, STEP = 64, 256
PLAN = ((16, 7), (32, 6), (64, 9), (16, 5))


@pytest.fixture
def make(jsonl, tokenizer):
    path = jsonl(TEXTS)

    def build(length=16, batch=1, *, workers=0, rank=0, world=1, **settings: Any) -> Loader:
        config = DataConfig(train=[SourceConfig(path=path)], validation_fraction=0.0, num_workers=workers, **settings)
        return build_loader(config, tokenizer, "train", length, batch, 0, rank, world, longest=LONGEST)

    return build


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_go_from_4k_to_64k_and_keep_the_tokens_of_a_step(preset) -> None:
    stages = plan_stages(preset, 1000, 4096, 8, 4)
    assert [stages[0].length, stages[-1].length] == [4096, 65536] and stages[0].first_step == 0
    assert {stage.length * stage.micro_batch_size * stage.accumulation_steps for stage in stages} == {4096 * 8 * 4}
    assert [stage.needs_memory for stage in stages] == [stage.length > 4096 * 8 for stage in stages]
    assert abs(sum(share for _, share in PRESETS[preset]) - 1) < 1e-9
    assert len(plan_stages(preset, 1, 4096, 8, 4)) == 1


def test_custom_stages_begin_after_those_before_and_the_last_stays() -> None:
    stages = plan_stages([[128, 10], [256, 5], [512, 1]], 100, 128, 6, 2)
    assert [(stage.first_step, stage.length) for stage in stages] == [(0, 128), (10, 256), (15, 512)]
    assert [(stage.micro_batch_size, stage.accumulation_steps) for stage in stages] == [(6, 2), (3, 2), (1, 3)]
    assert [stage_at(stages, step).length for step in (0, 9, 10, 14, 15, 99, 1000)] == [
        128,
        128,
        256,
        256,
        512,
        512,
        512,
    ]
    assert plan_stages(None, 5, 100, 3, 2) == [stage_at(plan_stages(None, 5, 100, 3, 2), 4)]


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ([[128, 60], [256, 60]], "its stages take 120 steps, more than training.steps 100"),
        ([[96, 5], [128, 5]], "96 does not divide the longest length 128"),
        ([[128, 5], [1024, 5]], r"128 × .* 4 × .* 1 = 512 tokens is not a whole number of rows of 1024"),
    ],
)
def test_what_does_not_fit_is_named(curriculum, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_stages(curriculum, 100, 128, 4, 1)


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 64])
def test_parts_tile_a_row_whatever_their_lengths(tokens: int) -> None:
    for parts in (1, 2, 4, 8):
        bounds = [Part(number, parts).bounds(tokens) for number in range(parts)]
        assert [end for _, end in bounds[:-1]] == [begin for begin, _ in bounds[1:]]
        assert (bounds[0][0], bounds[-1][1]) == (0, tokens)
        assert {begin for begin, _ in bounds} <= {Part(number, 8).bounds(tokens)[0] for number in range(8)}


def text_of(batch: Any, row: int) -> str:
    """Bytes of a row without padding, ends as `$`."""
    return "".join(chr(i) if i < 256 else "$" for i in batch["input_ids"][row].tolist() if i != 257)


def run(make, seed: int, **settings: Any) -> list[tuple[int, int, str]]:
    """(first token, length, text) of each row, stopped and resumed at random, ranks and workers changing."""
    rng, state, seen = random.Random(seed), None, []
    plan = [length for length, steps in PLAN for _ in range(steps)]
    loaders: list[Loader] = []
    streams: list[Any] = []
    length_now = None
    for step, length in enumerate(plan):
        if not loaders or rng.random() < 0.3:
            world = rng.choice([1, 2, 4]) if loaders else 1
            batch = STEP // length // world
            loaders = [make(length, batch, workers=rng.choice([0, 2]), rank=rank, world=world, **settings)
                       for rank in range(world)]  # fmt: skip
            streams = [iter(loader) for loader in loaders]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(json.loads(json.dumps(state)))
        elif length != length_now:
            for loader in loaders:
                loader.resize(length, STEP // length // len(loaders))
        length_now = length
        for stream in streams:
            batch_now = next(stream)
            assert batch_now["input_ids"].shape[1] == length
            seen += [(i * length, length, text_of(batch_now, row)) for row, i in enumerate(batch_now["sample_ids"])]
        state = loaders[0].state_dict()
        assert state["position"] * state["row_length"] == (step + 1) * STEP
    for stream in streams:
        stream.close()
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_each_token_comes_exactly_once_over_kills_stage_changes_ranks_and_workers(make, seed: int) -> None:
    seen = run(make, seed)
    covered = [place for first, length, _ in seen for place in range(first, first + length)]
    assert covered == list(range(sum(steps for _, steps in PLAN) * STEP))
    blocks = make(LONGEST).samples_per_epoch
    assert len(covered) > blocks * LONGEST, "the plan goes over an epoch's end"
    whole = {batch["sample_ids"][0]: text_of(batch, 0) for batch in islice(make(LONGEST), len(covered) // LONGEST)}
    joined: dict[int, str] = {}
    for first, _, text in seen:
        joined[first // LONGEST] = joined.get(first // LONGEST, "") + text
    assert joined == whole
    epoch = "".join(joined[block] for block in range(blocks))
    assert sorted(epoch) == sorted("".join(text + "$" for text in TEXTS))


def test_with_synthetic_rows_a_stage_change_is_exact_too(make) -> None:
    settings = {"synthetic": SyntheticConfig(probability=0.3, tasks=["copy", "add"])}
    assert run(make, 0, **settings) == run(make, 1, **settings)


def test_a_position_that_does_not_fit_is_refused(make) -> None:
    loader = make(16, 1)
    next(iter(loader))
    with pytest.raises(DataError, match="token 16 is not the beginning of a row of 32"):
        loader.resize(32, 1)
    with pytest.raises(DataError, match="token 16 is not the beginning of a row of 64"):
        make(64, 1).load_state_dict(loader.state_dict())
    with pytest.raises(ConfigError, match="sequence_length 24: must divide 64"):
        loader.resize(24, 1)
    with pytest.raises(ConfigError, match="needs packing"):
        make(16, 1, packing=False)


def test_a_state_from_before_there_were_stages_is_taken(make) -> None:
    loader = make(64, 2)
    next(iter(loader))
    state = {name: value for name, value in loader.state_dict().items() if name != "row_length"}
    again = make(64, 2)
    again.load_state_dict(state)
    assert again.position == 2
