"""`fusiontree bench` on a run, on its pruned export and on a model of transformers, and on what it refuses."""

import json
from pathlib import Path

import pytest

from fusiontree import HybridLanguageModel
from fusiontree.deploy import LayerPlan, PrunePlan, export_pruned_model, load_model, save_plan
from fusiontree.deploy.plan import identity_of
from fusiontree.models.presets import preset
from fusiontree.train.checkpoint import latest_checkpoint
from tests.cli.conftest import Call
from tests.eval.subjects import llama


@pytest.fixture(scope="module")
def pruned(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, full = tmp_path_factory.mktemp("pruned"), latest_checkpoint(run)
    plan = PrunePlan(model=identity_of(load_model(full)), layers=[LayerPlan(layer=0, keep="mamba")])
    save_plan(plan, folder / "plan.json")
    export_pruned_model(full, folder / "plan.json", folder / "slim")
    return folder / "slim"


def test_full_pruned_and_a_model_of_transformers(call: Call, run: Path, pruned: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "llama")
    out = tmp_path / "out"
    words = ("bench", run, pruned, tmp_path / "llama", "--lengths", "16", "--new-tokens", 3, "--repeats", 1)
    result = call(*words, "--threads", 1, "--output", out)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.strip().splitlines()[-1])
    full, slim, other = last["rows"]
    assert [row["model"] for row in last["rows"]] == ["run", "slim", "llama"] and last["failed"] == 0
    assert slim["memory"]["weights"] < full["memory"]["weights"] and slim["memory"]["kv"] < full["memory"]["kv"]
    assert slim["memory"]["ssm"] == full["memory"]["ssm"] > 0 == other["memory"]["ssm"]
    for row in last["rows"]:
        memory, speed = row["memory"], row["speed"]
        assert memory["peak"] == sum(memory[part] for part in ("weights", "kv", "ssm", "conv", "other", "activations"))
        assert memory["peak"] < memory["process"] and memory["weights"] == speed["weight_bytes"]
        assert {part: memory[part] for part in speed["cache"]} == speed["cache"]
    assert json.loads((out / "results.json").read_text())["rows"] == last["rows"]
    assert "| slim | 1 × 16 |" in (out / "results.md").read_text() and "Peak memory, MB" in result.stdout
    assert all((out / "plots" / f"{name}.png").exists() for name in ("prefill", "decode", "memory"))


def test_a_prompt_longer_than_a_table_of_positions_leaves_the_other_model_alone(call: Call, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "gate_rank": 4}
    config = preset("fusiontree", **sizes, mamba_head_dim=16, srte="low_rank", srte_rank=4, max_position_embeddings=64)
    HybridLanguageModel(config).save_pretrained(tmp_path / "table")
    llama().save_pretrained(tmp_path / "llama")
    words = ("--lengths", "63", "--new-tokens", 3, "--repeats", 1, "--threads", 1, "--output", tmp_path / "out")
    result = call("bench", tmp_path / "table", tmp_path / "llama", *words)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    said = "63 tokens and 3 new ones: it has a learned table of 64 positions; a prompt of at most 62 fits"
    assert errors == [f"error: table, 1 × 63: {said}"]
    last = json.loads(result.stdout.strip().splitlines()[-1])
    assert last["failed"] == 1 and [row["error"] for row in last["rows"]] == [said, None]


def test_an_interruption_says_how_to_go_on(
    call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusiontree.eval.system.bench.measure_memory_apart", interrupt)
    result = call("bench", run, "--lengths", "8", "--output", tmp_path / "out")
    assert result.exit_code == 130 and "goes on with the sizes that are not measured yet" in result.stderr


BAD = {
    "no model": (("./nowhere",), "not a model folder"),
    "one of them": (("{run}", "./nowhere"), "not a model folder"),
    "twice": (("{run}", "{run}"), "is named twice"),
    "no number": (("{run}", "--lengths", "long"), "--lengths long"),
    "no length": (("{run}", "--lengths", ","), "--lengths: name at least one number"),
    "a batch of none": (("{run}", "--batch-sizes", "0,1"), "--batch-sizes 0: at least 1"),
    "one new token": (("{run}", "--new-tokens", "1"), "--new-tokens 1: at least 2"),
    "no such device": (("{run}", "--device", "toaster"), "toaster"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(words: tuple[str, ...], said: str, call: Call, run: Path, tmp_path: Path) -> None:
    result = call("bench", *(word.format(run=run) for word in words), "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error, error
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()
