"""Sizes measured model by model: memory against arithmetic, limits, what is kept, tables and pictures."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from fusiontree.errors import ConfigError
from fusiontree.eval.system import bench as room
from fusiontree.eval.system.apart import ProcessDiedError, in_fresh_process
from fusiontree.eval.system.charts import draw_bench
from fusiontree.eval.system.memory import MemoryResult, NoRoomError, Source, measure_memory_apart, peak_growth
from fusiontree.eval.system.tables import markdown
from tests.eval.subjects import hybrid, llama

MB = 1_000_000


def mamba2() -> Mamba2ForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_heads": 4, "head_dim": 16, "chunk_size": 8}
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(**sizes, num_hidden_layers=2, n_groups=1))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


def contestant(name: str, model: Any) -> room.Contestant:
    return room.Contestant(name, Source(f"./{name}"), model)


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Peak memory is made up; what was asked for."""
    asked: list[tuple[str, int, int]] = []

    def measure(source: Source, length: int, _: int, batch_size: int, **__: int) -> MemoryResult:
        asked.append((source.place, length, batch_size))
        return MemoryResult(9 * MB, 4 * MB, 0, 0, 0, activations=2 * MB, peak=15 * MB, process=400 * MB)

    monkeypatch.setattr(room, "measure_memory_apart", measure)
    return asked


def kill_self() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise ConfigError("one line")


def divide(value: int) -> float:
    return 1 / value


def test_peak_growth_sees_what_was_freed_again_and_only_that() -> None:
    free_pages = [torch.ones(1_000_000) for _ in range(8)]
    del free_pages
    with peak_growth(torch.device("cpu")) as grown:
        torch.ones(16_000_000).sum()
        found = grown()
    assert 63 * MB <= found <= 72 * MB  # Linux counts pages by processor, and is some 100 KB off


def test_what_happens_in_a_fresh_process_arrives_here() -> None:
    assert in_fresh_process(divide, 4) == 0.25
    with pytest.raises(ConfigError, match=r"^one line$"):
        in_fresh_process(refuse)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        in_fresh_process(divide, 0)
    with pytest.raises(ProcessDiedError, match="SIGKILL"):
        in_fresh_process(kill_self)


def test_parts_of_the_peak_are_what_arithmetic_says(tmp_path: Path) -> None:
    """One wide MLP: its gate, its up projection and their product, (1024, 8192) in fp32, stand at the same time."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8192, num_hidden_layers=1)).save_pretrained(tmp_path)
    found = measure_memory_apart(Source(str(tmp_path)), 1024, 4, 1, threads=1)
    wide = 3 * 1024 * 8192 * 4
    assert 0.99 * wide <= found.activations <= 1.06 * wide
    assert found.weights == 4 * (3 * 64 * 8192 + 4 * 64 * 64 + 2 * 64 * 64 + 3 * 64) + found.other + 2 * 4 * 16
    assert found.kv == 2 * 1027 * 64 * 4 and found.ssm == found.conv == 0
    assert found.peak == found.weights + found.kv + found.other + found.activations < (found.process or 0)
    with pytest.raises(NoRoomError, match=r"out of memory: \d+ bytes were asked for at once"):
        measure_memory_apart(Source(str(tmp_path)), 1024, 4, 10**9, threads=1)


def test_every_model_at_every_size_and_each_once(tmp_path: Path, weighed: list[tuple[str, int, int]]) -> None:
    contestants = [contestant("ours", hybrid()), contestant("llama", llama()), contestant("mamba2", mamba2())]
    settings = room.BenchSettings(lengths=(24, 12), batch_sizes=(2, 1), new_tokens=4, repeats=2)
    found = room.bench(contestants, settings, tmp_path / "out", command="fusiontree bench …")
    rows, path = found.rows, found.path
    where = [(row["length"], row["batch_size"], row["model"]) for row in rows]
    names = [one.name for one in contestants]
    assert where == [(length, batch, name) for length in (12, 24) for batch in (1, 2) for name in names]
    by = dict(zip(where, rows, strict=True))
    for row in rows:
        speed = row["speed"]
        assert len(speed["prefill_seconds"]) == len(speed["first_token_seconds"]) == 2 and row["error"] is None
        assert all(0 < a < b for a, b in zip(speed["prefill_seconds"], speed["first_token_seconds"], strict=True))
        assert 0 < speed["token_latency_p50"] <= speed["token_latency_p95"] <= speed["token_latency_p99"]
    # keys and values of 2 layers, prompt + 3 tokens, fp32; states do not grow with the length
    assert by[24, 2, "llama"]["speed"]["cache"] == {"kv": 2 * 2 * 2 * 27 * 32 * 4, "ssm": 0, "conv": 0, "other": 0}
    ssm, conv = 2 * 4 * 16 * 8 * 4, 2 * (64 + 2 * 8) * 4 * 4  # per row: heads × 16 × state; channels × kernel
    assert by[24, 2, "mamba2"]["speed"]["cache"] == {"kv": 0, "ssm": 2 * ssm, "conv": 2 * conv, "other": 0}
    mixed = by[24, 1, "ours"]["speed"]["cache"]
    assert mixed["kv"] > 0 and mixed["ssm"] == by[12, 1, "ours"]["speed"]["cache"]["ssm"] > 0 and mixed["conv"] > 0
    kept = json.loads(path.read_text())
    assert kept["rows"] == rows and kept["models"]["llama"]["parameters"] == llama().num_parameters()
    assert kept["command"] == "fusiontree bench …" and kept["machine"]["device"] == "cpu"


def test_the_same_again_measures_only_what_is_new(tmp_path: Path, weighed: list[tuple[str, int, int]]) -> None:
    contestants = [contestant("llama", llama())]
    told: list[tuple[int, int, str]] = []

    class Shown:
        def __init__(self, _: str) -> None: ...
        def __enter__(self) -> Any:
            return lambda *what: told.append(what)

        def __exit__(self, *_: object) -> None: ...

    settings = room.BenchSettings(lengths=(12,), new_tokens=2, repeats=1)
    first = room.bench(contestants, settings, tmp_path / "out", progress=Shown).rows
    assert (
        [what[0] for what in told] == [0, 1, 2, 3] and told[-1][1] == 3 and told[2][2] == "1 × 12: llama, round 1 of 1"
    )
    settings = room.BenchSettings(lengths=(8, 12), new_tokens=2, repeats=1)
    both = room.bench(contestants, settings, tmp_path / "out")
    assert weighed == [("./llama", 12, 1), ("./llama", 8, 1)]
    assert [row for row in both.rows if row["length"] == 12] == first
    assert [row["length"] for row in json.loads(both.path.read_text())["rows"]] == [8, 12]
    again = room.bench(contestants, room.BenchSettings((8,), new_tokens=2, repeats=1), tmp_path / "out")
    assert len(weighed) == 2 and (again.rows, again.kept) == (both.rows[:1], both.rows)
    other = room.BenchSettings(lengths=(8,), new_tokens=3, repeats=1)
    with pytest.raises(ConfigError, match="was begun with new_tokens 2, now it is 3"):
        room.bench(contestants, other, tmp_path / "out")


def test_an_interruption_loses_only_the_size_it_hit(
    tmp_path: Path, weighed: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = room.measure_speed

    def interrupted(models: Any, length: int, *more: Any, **named: Any) -> Any:
        if length == 12:
            raise KeyboardInterrupt
        return speed(models, length, *more, **named)

    monkeypatch.setattr(room, "measure_speed", interrupted)
    settings = room.BenchSettings(lengths=(8, 12), new_tokens=2, repeats=1)
    with pytest.raises(KeyboardInterrupt):
        room.bench([contestant("llama", llama())], settings, tmp_path / "out")
    assert [row["length"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == [8]


def test_more_positions_than_a_model_has(tmp_path: Path, weighed: list[tuple[str, int, int]]) -> None:
    contestants = [contestant("gpt2", gpt2()), contestant("short", llama(16)), contestant("mamba2", mamba2())]
    rows = room.bench(contestants, room.BenchSettings((13, 14), new_tokens=4, repeats=1), tmp_path / "out").rows
    assert [row["error"] is None for row in rows] == [True, True, True, False, True, True]
    said = "14 tokens and 4 new ones: it has a learned table of 16 positions; a prompt of at most 13 fits"
    assert rows[3]["error"] == said and rows[3]["speed"] is None
    assert rows[4]["note"] == "beyond the 16 positions its config states" and rows[4]["speed"] is not None
    assert rows[5]["note"] is None
    assert ("./gpt2", 14, 1) not in weighed


def test_a_model_without_room_leaves_the_others_alone(
    tmp_path: Path, weighed: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = llama()

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")

    monkeypatch.setattr(large, "generate", no_room)
    contestants = [contestant("large", large), contestant("llama", llama())]
    rows = room.bench(contestants, room.BenchSettings((8,), new_tokens=2, repeats=1), tmp_path / "out").rows
    assert rows[0]["error"] == "out of memory: 20.00 GiB were asked for at once" and rows[0]["speed"] is None
    assert rows[1]["error"] is None and len(rows[1]["speed"]["decode_seconds"]) == 1


def test_results_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds other results"):
        room.bench([contestant("llama", llama())], room.BenchSettings((8,)), tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": ()}, "--lengths: name at least one number"),
        ({"lengths": (0, 5)}, "--lengths 0: at least 1"),
        ({"batch_sizes": (-1,)}, "--batch-sizes -1: at least 1"),
        ({"new_tokens": 1}, "--new-tokens 1: at least 2"),
        ({"repeats": 0}, "--repeats 0: at least 1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        room.BenchSettings(**({"lengths": (8,)} | changes))


def test_tables_and_pictures(tmp_path: Path) -> None:
    memory = asdict(MemoryResult(9 * MB, 4 * MB, MB, 2 * MB, 0, activations=2500 * MB, peak=2516 * MB))
    speed = {"prefill_tokens_per_second": 1234.5, "decode_tokens_per_second": 98.76, "time_to_first_token": 0.25}
    speed |= {"token_latency_p50": 0.01, "token_latency_p95": 0.0123, "token_latency_p99": 2.0}
    good = {
        "model": "a",
        "length": 1024,
        "batch_size": 2,
        "speed": speed,
        "memory": memory,
        "note": None,
        "error": None,
    }
    bad = {**good, "model": "b|c", "speed": None, "memory": None, "error": "out of memory"}
    text = markdown([good, bad])
    assert "| a | 2 × 1,024 | 1,234 | 98.8 | 250 | 10 | 12.3 | 2,000 |" in text
    assert "| a | 2 × 1,024 | 2,516 | 9 | 4 | 1 | 2 | 2,500 | – |" in text and "- b|c, 2 × 1,024: out of memory" in text
    pictures = draw_bench([good, {**good, "length": 2048}, bad], tmp_path / "plots")
    assert [path.name for path in pictures] == ["prefill.png", "decode.png", "memory.png"]
    assert all(path.stat().st_size > 5000 for path in pictures)
    assert draw_bench([bad], tmp_path / "none") == []
