"""The loader: exact batches, exactly once per epoch, exact resume at any place, workers and ranks."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
import torch

from fusiontree.data import Batch, DataConfig, Loader, SourceConfig, build_loader, train_tokenizer
from fusiontree.errors import ConfigError, DataError

TEXTS = [f"<{index}>" + chr(97 + index % 26) * (3 + 11 * index % 70) for index in range(80)]
L, B = 32, 4


@pytest.fixture
def make(jsonl, tokenizer):
    path = jsonl(TEXTS)

    def build(split="train", *, seed=0, rank=0, world_size=1, batch=B, **settings: Any):
        config = DataConfig(**{"train": [SourceConfig(path=path)], "validation_fraction": 0.1, **settings})
        return build_loader(config, tokenizer, split, L, batch, seed, rank, world_size)

    return build


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a["sample_ids"] == b["sample_ids"]
        and all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels", "position_ids"))
        for a, b in zip(left, right, strict=True)
    )


def documents(batch: Batch, eos: int = 256, pad: int = 257) -> list[str]:
    """Stretches of the rows between restarts of the positions, without padding; `$` marks the end of a document."""
    found = []
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [index for index, position in enumerate(positions) if position == 0]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[begin:end] == list(range(end - begin))
            if ids[begin] != pad:
                stretch = [token for token in ids[begin:end] if token != pad]
                assert eos not in stretch[:-1], "a document goes on after its end"
                found.append(bytes(t for t in stretch if t < 256).decode() + "$" * (stretch[-1] == eos))
    return found


def test_a_packed_batch_keeps_documents_apart(make) -> None:
    batch = next(iter(make()))
    assert set(batch) == {"input_ids", "labels", "position_ids", "sample_ids"}
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (B, L) and batch[name].dtype == torch.int64
    first = batch["position_ids"] == 0
    assert bool((batch["labels"][first] == -100).all())
    assert torch.equal(batch["labels"][~first], batch["input_ids"][~first])
    wholes = {text + "$" for text in TEXTS}
    for stretch in documents(batch):
        assert any(stretch in whole for whole in wholes)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_sample_and_every_token_once(make, packing: bool, workers: int) -> None:
    loader = make(packing=packing, num_workers=workers, batch=1, validation_fraction=0.0)
    for epoch in range(2):
        batches = take(loader, loader.samples_per_epoch)
        ids = [sample for batch in batches for sample in batch["sample_ids"]]
        assert ids == list(range(epoch * loader.samples_per_epoch, (epoch + 1) * loader.samples_per_epoch))
        text = sorted("".join(stretch for batch in batches for stretch in documents(batch)))
        assert text == sorted("".join(text + "$" for text in TEXTS))


def test_unpacked_rows_hold_one_document_and_a_mask(make) -> None:
    for batch in take(make(packing=False), 20):
        mask = batch["attention_mask"]
        assert mask.dtype == torch.int64 and mask.shape == batch["input_ids"].shape
        assert bool((mask.diff(dim=1) <= 0).all()) and mask.shape[1] <= L and mask.shape[1] % 8 == 0
        assert int(mask.sum(dim=1).max()) > mask.shape[1] - 8
        assert bool((batch["labels"][mask == 0] == -100).all()) and bool((batch["input_ids"][mask == 0] == 257).all())
        assert bool((batch["labels"][:, 0] == -100).all()) and len(documents(batch)) == B


def test_epochs_and_seeds_differ_and_repeat(make) -> None:
    loader = make()
    size = loader.samples_per_epoch
    orders = [[loader.origins(sample) for sample in range(epoch * size, (epoch + 1) * size)] for epoch in range(2)]
    assert orders[0] != orders[1]
    assert same(take(make(), 30), take(make(), 30))
    assert not same(take(make(), 3), take(make(seed=1), 3))


def test_the_data_seed_takes_the_place_of_the_runs(jsonl, tokenizer) -> None:
    config = DataConfig(train=[SourceConfig(path=jsonl(TEXTS))])
    own = config.model_copy(update={"seed": 3})
    loaders = (
        build_loader(own, tokenizer, "train", L, B, seed=0),
        build_loader(config, tokenizer, "train", L, B, seed=3),
    )
    assert same(take(loaders[0], 3), take(loaders[1], 3))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("done", [0, 1, 7, 25, 60])
@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0)])
def test_resume_gives_the_batch_that_would_have_come(make, packing: bool, done: int, workers: tuple[int, int]) -> None:
    loader = make(packing=packing, num_workers=workers[0])
    stream = iter(loader)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(stream) for _ in range(10)]
    resumed = make(packing=packing, num_workers=workers[1])
    resumed.load_state_dict(state)
    assert resumed.position == done * B
    assert same(take(resumed, 10), expected)


def test_a_position_loaded_while_iterating_counts_at_once(make) -> None:
    for workers in (0, 2):
        loader = make(num_workers=workers)
        state, stream = loader.state_dict(), iter(loader)
        first = next(stream)
        next(stream)
        loader.load_state_dict(state)
        assert same([next(stream)], [first])


def test_ranks_divide_each_step_and_another_number_of_ranks_goes_on(make) -> None:
    alone = take(make(batch=4), 12)
    pair = [take(make(batch=2, rank=rank, world_size=2), 6) for rank in range(2)]
    for step in range(6):
        assert pair[0][step]["sample_ids"] + pair[1][step]["sample_ids"] == alone[step]["sample_ids"]
        joined = torch.cat([pair[rank][step]["input_ids"] for rank in range(2)])
        assert torch.equal(joined, alone[step]["input_ids"])
    loader = make(batch=2, rank=1, world_size=2)
    take(loader, 6)
    other = make(batch=4)
    other.load_state_dict(loader.state_dict())
    assert same(take(other, 6), alone[6:])


@pytest.mark.parametrize("packing", [True, False])
def test_validation_is_finite_complete_and_starts_over(make, packing: bool) -> None:
    loader = make("validation", packing=packing)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert [i for batch in batches for i in batch["sample_ids"]] == list(range(loader.samples_per_epoch))
    assert same(list(loader), batches) and same(list(make("validation", packing=packing, seed=9)), batches)
    held = "".join(stretch for batch in batches for stretch in documents(batch))
    learnt = make("train", batch=1, packing=packing)
    rest = "".join(s for batch in take(learnt, learnt.samples_per_epoch) for s in documents(batch))
    assert sorted(held + rest) == sorted("".join(text + "$" for text in TEXTS))


@pytest.mark.parametrize("world_size", [2, 3, 7, 40])
def test_every_rank_sees_as_many_validation_batches_of_the_same_size(make, world_size: int) -> None:
    ranks = [list(make("validation", rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for step in zip(*ranks, strict=True):
        assert len({batch["input_ids"].shape for batch in step}) == 1
    ids = sorted(i for batches in ranks for batch in batches for i in batch["sample_ids"] if i >= 0)
    assert ids == list(range(make("validation").samples_per_epoch))
    fillers = [b["labels"][k] for r in ranks for b in r for k, i in enumerate(b["sample_ids"]) if i < 0]
    assert all(bool((labels == -100).all()) for labels in fillers)


def test_changed_text_order_or_cutting_is_refused(make, jsonl) -> None:
    state = make().state_dict()
    other = jsonl([*TEXTS[:-1], "another"], "other.jsonl")
    with pytest.raises(DataError, match="the text, tokenizer or mixture"):
        make(train=[SourceConfig(path=other)]).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 0 when it was saved and is 1 now"):
        make(seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="packing was True"):
        make(packing=False).load_state_dict(state)
    with pytest.raises(DataError, match="split was train"):
        make("validation").load_state_dict(state)
    with pytest.raises(DataError, match="the text, tokenizer or mixture"):
        make(validation_fraction=0.3).load_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"position": -1}, {"position": True}, {"position": 1.5}, {"position": None}, {"version": 9}]
)
def test_a_broken_state_is_refused(make, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a loader state"):
        make().load_state_dict({**make().state_dict(), **change})


def test_weighted_sources_have_their_shares(jsonl, tokenizer) -> None:
    first, second = jsonl(["a" * 30] * 100, "a.jsonl"), jsonl(["b" * 30] * 20, "b.jsonl")
    sources = [SourceConfig(path=first, weight=1.0), SourceConfig(path=second, weight=3.0)]
    loader = build_loader(DataConfig(train=sources, validation_fraction=0.0), tokenizer, "train", 31, 4)
    ids = torch.cat([batch["input_ids"] for batch in take(loader, 60)])
    share = (ids == ord("b")).sum() / ((ids == ord("a")) | (ids == ord("b"))).sum()
    assert abs(float(share) - 0.75) < 0.03


def test_a_far_position_costs_no_more_than_a_near_one(make) -> None:
    loader = make()
    batch = loader.batch_at(10**12)
    assert batch["sample_ids"][0] == 10**12 and batch["input_ids"].shape == (B, L)


def test_origins_name_the_documents_of_a_row(make) -> None:
    loader = make(batch=1)
    for batch in take(loader, 10):
        (sample,) = batch["sample_ids"]
        lines = [int(origin.rsplit(":", 1)[1]) for origin in loader.origins(sample)]
        stretches = documents(batch)
        assert len(lines) == len(stretches)
        assert all(stretch in TEXTS[line - 1] + "$" for line, stretch in zip(lines, stretches, strict=True))


def test_a_trained_tokenizer_and_wide_ids_survive(jsonl, tmp_path) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    tokenizer = train_tokenizer([source], 300, tmp_path / "t")
    loader = build_loader(DataConfig(train=[source], validation=[source]), tokenizer, "validation", 1024, 8)
    (batch,) = loader
    text = tokenizer.decode(batch["input_ids"].flatten(), skip_special_tokens=False)
    assert sorted(text.split("<|pad|>")[0].split("<|endoftext|>")) == sorted([*TEXTS, ""])


def test_impossible_requests_are_refused(make) -> None:
    for settings in ({"batch": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}):
        with pytest.raises(ConfigError):
            make(**settings)
    with pytest.raises(ConfigError, match="split 'test'"):
        make("test")
    with pytest.raises(DataError, match=r"data\.train: no sources"):
        make(train=[])
    with pytest.raises(DataError, match="validation_fraction is 0"):
        make("validation", validation_fraction=0.0)
    with pytest.raises(TypeError, match="never ends"):
        len(make())


def test_the_first_validation_batches_are_a_fair_sample_of_all_sources(jsonl, tokenizer) -> None:
    paths = [jsonl([letter * 31] * 200, f"{letter}.jsonl") for letter in "abc"]
    config = DataConfig(validation=[SourceConfig(path=path) for path in paths])
    first = next(iter(build_loader(config, tokenizer, "validation", L, 60)))
    counts = [int((first["input_ids"][:, 0] == ord(letter)).sum()) for letter in "abc"]
    assert sum(counts) == 60 and min(counts) >= 10
