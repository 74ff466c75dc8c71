"""Every sample exactly once per epoch, in the order of a run that was never interrupted: listed, not sampled.

Each word of the text occurs once in it, so the tokens of an epoch are counted one by one. The runs are real processes,
one per rank, that write what they got with fsync and are killed with SIGKILL at random moments in the middle of a
stage; they go on from the last saved state with another number of ranks and workers.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusiontree.data import Batch, DataConfig, Loader, SourceConfig, build_loader, prepare_static, streaming
from tests.faults.process import forks

SECONDS = 60.0
WORDS, EOS, PAD = 9000, 9000, 9001
TOKENS = 256  # of a step
LONGEST = 64


class Case(NamedTuple):
    """What is read, and the row length of each step; `packing` false: rows of one document, always of LONGEST."""

    folder: Path
    sources: tuple[dict[str, Any], ...]
    lengths: tuple[int, ...]
    packing: bool = True

    def loader(self, step: int, rank: int = 0, world: int = 1, workers: int = 0) -> Loader:
        """As the training engine would make it at this step."""
        train = [SourceConfig(**source) for source in self.sources]
        config = DataConfig(train=train, validation_fraction=0.0, packing=self.packing, num_workers=workers)
        config = config.model_copy(update={"cache_dir": str(self.folder / "cache")})
        length = self.lengths[step]
        longest = LONGEST if self.packing else None
        return build_loader(config, words(), "train", length, TOKENS // length // world, 3, rank, world, longest)


def words() -> PreTrainedTokenizerFast:
    """Word w17 is token 17."""
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<eos>": EOS, "<pad>": PAD}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def documents(first: int, count: int) -> list[str]:
    """Documents of 3 to 69 words, no word twice."""
    texts = []
    for number in range(count):
        size = 3 + 11 * number % 67
        texts.append(" ".join(f"w{first + index}" for index in range(size)))
        first += size
    assert first <= WORDS
    return texts


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """A lazy, a static and a streaming source of 60, 50 and 40 documents."""
    lazy = write(tmp_path / "lazy.jsonl", documents(0, 60))
    static = write(tmp_path / "static.jsonl", documents(3000, 50))
    prepare_static([SourceConfig(path=static)], words(), tmp_path / "static")
    for part in range(2):
        write(tmp_path / f"stream{part}.jsonl", documents(6000 + 1000 * part, 20))
    return [
        {"path": lazy},
        {"path": str(tmp_path / "static"), "mode": "static"},
        {"path": f"{tmp_path}/stream*.jsonl", "mode": "streaming"},
    ]


def run_rank(case: Case, log: Path, state: Path, rank: int, world: int, workers: int, together: Any) -> None:
    """Batches to the end of the plan, each written down; rank 0 saves a state after every fifth step."""
    streaming.BATCH_DOCUMENTS = 7
    saved = json.loads(state.read_text()) if state.exists() else {"step": 0}
    loader = case.loader(saved["step"], rank, world, workers)
    if "loader" in saved:
        loader.load_state_dict(saved["loader"])
    stream, length = iter(loader), case.lengths[saved["step"]]
    with log.open("a") as handle:
        for step in range(saved["step"], len(case.lengths)):
            if case.lengths[step] != length:
                length = case.lengths[step]
                loader.resize(length, TOKENS // length // world)
            batch = next(stream)
            line = {"step": step, "length": length, "ids": batch["sample_ids"], "rows": rows_of(batch)}
            synced(handle, json.dumps(line) + "\n")
            together.wait(SECONDS)  # as the gradients of a step do
            if rank == 0 and (step + 1) % 5 == 0:
                with state.with_suffix(".tmp").open("w") as draft:
                    synced(draft, json.dumps({"step": step + 1, "loader": loader.state_dict()}))
                os.replace(state.with_suffix(".tmp"), state)


def synced(handle: Any, text: str) -> None:
    handle.write(text)
    handle.flush()
    os.fsync(handle.fileno())


def rows_of(batch: Batch) -> list[list[int]]:
    """Tokens of each row without padding."""
    return [[token for token in row if token != PAD] for row in batch["input_ids"].tolist()]


def read_log(path: Path) -> dict[int, dict[str, Any]]:
    """What a rank wrote, by step; a line that a kill cut off is left out."""
    text = path.read_text() if path.exists() else ""
    return {line["step"]: line for line in map(json.loads, text.rpartition("\n")[0].splitlines())}


def run_until(case: Case, name: str, world: int, workers: int, kill_at: int | None, rng: random.Random) -> range:
    """Ranks that begin at the saved state; killed some moments after a step is written. Gives the steps that count."""
    state = case.folder / "state.json"
    begin = json.loads(state.read_text())["step"] if state.exists() else 0
    together = forks.Barrier(world)
    logs = [case.folder / f"{name}-{rank}.log" for rank in range(world)]
    ranks = [
        forks.Process(target=run_rank, args=(case, log, state, rank, world, workers, together), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    if kill_at is not None:
        end = time.monotonic() + SECONDS
        while max(read_log(logs[0]), default=-1) < kill_at:
            assert time.monotonic() < end and ranks[0].is_alive(), "the run stands still"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        for process in rng.sample(ranks, world):
            process.kill()
    for process in ranks:
        process.join(SECONDS)
    assert [process.exitcode for process in ranks] == [0 if kill_at is None else -9] * world
    return range(begin, json.loads(state.read_text())["step"])


def listed(case: Case, name: str, world: int) -> Iterator[tuple[int, int, list[int], list[list[int]]]]:
    """(step, length, ids, rows) of each step that all ranks wrote, their parts in order."""
    logs = [read_log(case.folder / f"{name}-{rank}.log") for rank in range(world)]
    for step in sorted(set.intersection(*map(set, logs))):
        parts = [log[step] for log in logs]
        ids = [sample for part in parts for sample in part["ids"]]
        yield step, parts[0]["length"], ids, [row for part in parts for row in part["rows"]]


def uninterrupted(case: Case) -> list[tuple[int, int, list[int], list[list[int]]]]:
    loader = case.loader(0)
    stream, seen = iter(loader), []
    for step, length in enumerate(case.lengths):
        if step and length != case.lengths[step - 1]:
            loader.resize(length, TOKENS // length)
        batch = next(stream)
        seen.append((step, length, batch["sample_ids"], rows_of(batch)))
    return seen


def check_run(case: Case, seed: int, figure: Callable[..., None]) -> list[tuple[int, int, list[int], list[list[int]]]]:
    """Kill a run three times, changing ranks and workers; what it listed is what a run never killed lists."""
    whole, rng, counted = uninterrupted(case), random.Random(seed), []
    steps = len(case.lengths)
    kills = [rng.randrange(steps * third // 3 + 7, steps * (third + 1) // 3 - 12) for third in range(3)]
    layouts = [(1, 0), (2, 2), (4, 1), (1, 0)]
    for number, (world, workers) in enumerate(layouts):
        kill_at = kills[number] if number < 3 else None
        valid = run_until(case, f"part{number}", world, workers, kill_at, rng)
        wrote = list(listed(case, f"part{number}", world))
        assert wrote == whole[valid.start : valid.start + len(wrote)], "also what is lost by the kill"
        counted += wrote[: len(valid)]
    assert counted == whole
    figure("kills", 3)
    figure("samples listed", sum(len(ids) for _, _, ids, _ in whole))
    return whole


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_DOCUMENTS", 7)


def every_word_once(epochs: dict[int, list[int]], sources: list[dict[str, Any]]) -> None:
    """All epochs but the last, which is cut off, hold each token of the text once."""
    texts = [text for source in sources for text in texts_of(source)]
    expected = Counter(int(word[1:]) for text in texts for word in text.split()) + Counter({EOS: len(texts)})
    assert len(epochs) >= 3
    for epoch in sorted(epochs)[:-1]:
        assert Counter(epochs[epoch]) == expected


def texts_of(source: dict[str, Any]) -> list[str]:
    path = Path(source["path"])
    path = path.with_suffix(".jsonl") if path.is_dir() else path
    lines = [line for name in sorted(path.parent.glob(path.name)) for line in name.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.fault(row=11)
@pytest.mark.fault(row=12)
@pytest.mark.parametrize("seed", range(2))
def test_over_kills_ranks_workers_and_stages(sources, tmp_path: Path, fault_figure, seed: int) -> None:
    """Rows 11 and 12: a lazy and a static source, three lengths of rows, several epochs."""
    case = Case(tmp_path, tuple(sources[:2]), (16,) * 30 + (32,) * 30 + (64,) * 30)
    whole = check_run(case, seed, fault_figure)
    places = [sample * length for _, length, ids, _ in whole for sample in ids]
    steps = [range(step * TOKENS, (step + 1) * TOKENS, length) for step, length in enumerate(case.lengths)]
    assert places == [place for step in steps for place in step]
    blocks = case.loader(89).samples_per_epoch
    epochs: dict[int, list[int]] = {}
    for _, length, ids, rows in whole:
        for sample, row in zip(ids, rows, strict=True):
            epochs.setdefault(sample * length // (blocks * LONGEST), []).extend(row)
    every_word_once(epochs, sources[:2])


@pytest.mark.fault(row=11)
@pytest.mark.fault(row=12)
def test_over_kills_ranks_and_workers_with_a_document_per_row(sources, tmp_path: Path, fault_figure) -> None:
    """Rows 11 and 12: rows of similar length together, padded."""
    case = Case(tmp_path, tuple(sources[:2]), (32,) * 90, packing=False)
    whole = check_run(case, 5, fault_figure)
    assert [sample for _, _, ids, _ in whole for sample in ids] == list(range(90 * 8))
    size = case.loader(0).samples_per_epoch
    epochs: dict[int, list[int]] = {}
    for _, _, ids, rows in whole:
        for sample, row in zip(ids, rows, strict=True):
            epochs.setdefault(sample // size, []).extend(row)
    every_word_once(epochs, sources[:2])


@pytest.mark.fault(row=11)
@pytest.mark.fault(row=12)
def test_over_kills_ranks_workers_and_stages_with_a_stream_and_weights(sources, tmp_path: Path, fault_figure) -> None:
    """Rows 11 and 12: with weights there is no common epoch; each source goes through its own text again and again."""
    weighted = [{**source, "weight": weight} for source, weight in zip(sources, (1.0, 1.0, 2.0), strict=True)]
    case = Case(tmp_path, tuple(weighted), (16,) * 40 + (32,) * 40 + (64,) * 40)
    whole = check_run(case, 9, fault_figure)
    came = [token for _, _, _, rows in whole for row in rows for token in row]
    for number, source in enumerate(sources):
        own = [int(word[1:]) for text in texts_of(source) for word in text.split()]
        mine = [token for token in came if 3000 * number <= token < 3000 * (number + 1)]
        passes = [mine[begin : begin + len(own)] for begin in range(0, len(mine), len(own))]
        assert len(passes) >= 3, "several passes over each source"
        assert all(sorted(one) == sorted(own) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1]) and set(passes[-1]) <= set(own)
