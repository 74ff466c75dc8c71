"""The benchmarks' own arithmetic; their timings are made by hand on an idle machine."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import activation_memory, compile_speed, machine, prompt_lengths
from benchmarks.contestants import NAMES, QUICK, TOLERANCE, Sizes, _count_on_meta, build, matching_intermediate_size
from benchmarks.floor import forward_flops_per_token
from benchmarks.length_scaling import exponent
from benchmarks.train_speed import measure, summarise


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(overrides={"mamba_expand": 1.0})])
def test_contestants_have_equal_parameter_counts(sizes):
    target = _count_on_meta("fusiontree", sizes, 0)
    for name in ("falcon_h1", "llama"):
        count = _count_on_meta(name, sizes, matching_intermediate_size(name, sizes, target))
        assert abs(count / target - 1) <= TOLERANCE


def test_every_contestant_trains_and_takes_its_turn():
    seconds = measure(build(NAMES, QUICK), batch=1, length=32, rounds=2, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(NAMES, 2)
    rows = summarise({"fusiontree": [2.0, 1.0, 4.0], "llama": [1.0, 1.0, 1.0]}, 100, "eager")
    assert [row["tokens/s (median)"] for row in rows] == [50.0, 100.0]
    assert [row["ours / this"] for row in rows] == [1.0, 0.5]


def test_flops_count_attention_once_causally():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    matrices = 2 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 64)
    assert forward_flops_per_token(model, 40) == matrices + 2 * 2 * 2 * 32 * 40 / 2


def test_exponent_is_the_slope_of_the_longer_half():
    lengths = [1, 2, 4, 8, 16]
    assert exponent(lengths, [7.0, 7.0, 16.0, 64.0, 256.0]) == pytest.approx(2)


def test_the_readme_table_is_made_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "FOLDER", tmp_path)
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text(f"top\n{machine.BEGIN}\nold\n{machine.END}\nend\n")
    rows = [{"model": "a", "tokens/s": 1234.5, "ratio": 1.25, "count": 1000}]
    for _ in range(2):
        machine.write_result("some_speed", machine.describe(), {"quick": False}, {"rows": rows, "remarks": ["Note."]})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("top\n") and text.endswith("end\n") and "old" not in text
    assert text.count("| a | 1,234 | 1.25 | 1,000 |") == 1 and f"torch {torch.__version__}" in text
    assert json.loads((tmp_path / "results" / "some_speed.json").read_text())["result"]["rows"] == rows


def test_a_quick_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    machine.write_result("some_speed", {}, {"quick": True}, {"rows": []})
    assert not (tmp_path / "results").exists()


def test_packed_rows_of_the_compile_benchmark_hold_documents():
    positions = compile_speed.documents(3, 50, seed=0)
    assert positions.shape == (3, 50) and (positions[:, 0] == 0).all()
    step = positions[:, 1:] - positions[:, :-1]
    assert ((step == 1) | (positions[:, 1:] == 0)).all() and (positions == 0).sum() > 6
    found = {"first": {"eager": 1.0, "compiled": 9.0}, "seconds": {"eager": [2.0, 4.0, 2.0], "compiled": [1.0] * 3}}
    rows = compile_speed.summarise(found, 100, "packed")
    assert [row["tokens/s (median)"] for row in rows] == [50, 100] and rows[1]["this / eager"] == 2


def test_kept_bytes_fall_with_what_is_recomputed():
    model, ids, positions = activation_memory.prepared("64x2x1x96")
    kept = []
    for mode in activation_memory.MODES:
        activation_memory.recompute(model, mode)
        kept.append(activation_memory.kept_bytes(model, ids, positions))
    assert kept[0] > 2 * kept[1] > 2 * kept[2] > 0
    found = {mode: {"kept": size, "growth": 2 * size} for mode, size in zip(activation_memory.MODES, kept, strict=True)}
    rows = activation_memory.summarise("64x2x1x96", found, {mode: [1.0] for mode in activation_memory.MODES})
    assert rows[0]["saved"] == "0%" and rows[1]["kept MB"] == kept[1] / 1e6


def test_the_pruned_twin_of_the_prompt_benchmark_has_lost_every_other_attention():
    models = prompt_lengths.models_of(QUICK, torch.bfloat16)
    assert list(models) == ["fusiontree", "pruned", "falcon_h1", "llama"]
    assert [layer["mixers"] for layer in models["pruned"].config.layers] == [["mamba"], ["mamba", "attention"]]
    speed = dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token"), 2.0)
    speed |= {f"token_latency_p{percent}": 0.5 for percent in (50, 95, 99)}
    memory = dict.fromkeys(("peak", "weights", "kv", "ssm", "conv", "activations"), 3_000_000)
    good = {"model": "a", "length": 8, "batch_size": 1, "speed": speed, "memory": memory, "error": None}
    (row,) = prompt_lengths.summarise([good, {**good, "speed": None, "memory": None, "error": "out of memory"}])
    assert row["p99 ms"] == 500 and row["kv MB"] == row["peak MB"] == 3 and row["first token s"] == 2
