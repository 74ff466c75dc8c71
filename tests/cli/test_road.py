"""train → prune → export → generate, through the verbs a person types."""

import json
import shutil
from pathlib import Path

import pytest

from fusiontree.deploy import load_model
from tests.cli.conftest import Call


@pytest.fixture(scope="module")
def plan(call: Call, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    words = ("prune", run, "--max-loss-increase", "100", "--out", out, "--length", "32", "--batch-size", "2")
    result = call(*words, "--batches", "2")
    assert result.exit_code == 0, result.output
    assert "plan:" in result.output
    return out


@pytest.fixture(scope="module")
def pruned(call: Call, run: Path, plan: Path) -> Path:
    out = plan.parent / "pruned"
    result = call("export", run, "--plan", plan, "--out", out)
    assert result.exit_code == 0, result.output
    assert "equal to the masked original: relative error" in result.output
    return out


def test_train_leaves_a_run_folder_and_tells_before_and_after(run: Path, call: Call, config: Path) -> None:
    assert json.loads((run / "summary.json").read_text())["step"] == 4
    again = call("train", config)
    assert again.exit_code == 0
    assert "validation loss" in again.output and "→" in again.output


def test_train_takes_overrides_and_goes_on(call: Call, config: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    result = call("train", config, f"system.run_dir={copy}", "training.steps=6")
    assert result.exit_code == 0, result.output
    steps = [
        json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines() if "lm_loss" in line
    ]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_budget_without_bounds_takes_one_branch_of_every_layer(plan: Path) -> None:
    content = json.loads(plan.read_text())
    assert [layer["keep"] in ("mamba", "attention") for layer in content["layers"]] == [True, True]
    assert not list(plan.parent.glob("*.measurements.jsonl"))


def test_prune_measures_on_named_files(call: Call, run: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = (
        "prune",
        run,
        "--data",
        corpus,
        "--max-loss-increase",
        "0",
        "--out",
        out,
        "--length",
        "32",
        "--batches",
        "1",
    )
    (run / "gates.jsonl").rename(tmp_path / "gates.jsonl")
    (run / "gates.jsonl").write_text("", encoding="utf-8")  # as a run leaves it that was too short for a line
    result = call(*words, env={"FUSIONTREE_CACHE": str(tmp_path)})
    (tmp_path / "gates.jsonl").replace(run / "gates.jsonl")
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["budget"] == {"max_loss_increase": 0.0}


def test_the_export_is_smaller_and_loads(run: Path, pruned: Path) -> None:
    full = load_model(sorted((run / "checkpoints").glob("step-*"))[-1])
    assert load_model(pruned).num_parameters() < full.num_parameters()


def test_generate_continues_the_prompt_and_repeats_with_a_seed(call: Call, pruned: Path) -> None:
    words = ("generate", pruned, "--prompt", "the state is", "--max-new-tokens", "8", "--temperature", "1.5")
    first, second = call(*words, "--seed", "3"), call(*words, "--seed", "3")
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("the state is") and len(first.stdout) > len("the state is\n")
    assert first.stdout == second.stdout
    assert call(*words, "--seed", "4").stdout != first.stdout


def test_generate_reads_the_prompt_from_standard_input(call: Call, run: Path) -> None:
    result = call("generate", run, "--prompt", "-", "--max-new-tokens", "2", input="the window")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the window")


def test_chat_answers_until_an_empty_line(call: Call, run: Path) -> None:
    result = call("chat", run, "--max-new-tokens", "4", input="hello\n/reset\nagain\n\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("> ") == 4


def test_a_conversation_that_grows_too_long_is_not_the_end(call: Call, run: Path) -> None:
    long = "the state is read " * 8
    result = call("chat", run, "--max-new-tokens", "16", input=f"{long}\n" * 8 + "/reset\nhello\n\n")
    assert result.exit_code == 0, result.output
    assert "/reset makes room" in result.stderr
    alone = call("chat", run, "--max-new-tokens", "255", input=f"{long}\n")
    assert alone.exit_code == 2 and "shorten one of them" in alone.stderr


@pytest.mark.parametrize("target", ["config", "run", "checkpoint", "pruned"])
def test_info_counts_what_the_weights_hold(target: str, call: Call, config: Path, run: Path, pruned: Path) -> None:
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    path = {"config": config, "run": run, "checkpoint": checkpoint, "pruned": pruned}[target]
    model = load_model(pruned if target == "pruned" else checkpoint)
    result = call("info", path, "--length", "64")
    assert result.exit_code == 0, result.output
    total = next(line for line in result.stdout.splitlines() if line.startswith("total"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in total
    assert "64 tokens" in result.stdout
    assert target != "config" or "training, each of" in result.stdout


def test_report_writes_a_page(call: Call, run: Path) -> None:
    result = call("report", run)
    assert result.exit_code == 0, result.output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert ">Parameters<" in page and "Left out" not in page


def test_tokenizer_and_data_make_folders_that_train_takes(
    call: Call, corpus: Path, config: Path, tmp_path: Path
) -> None:
    made = call("tokenizer", "train", corpus, "--vocab-size", "280", "--out", tmp_path / "tokenizer")
    assert made.exit_code == 0, made.output
    words = ("data", "prepare", corpus, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "tokens")
    prepared = call(*words)
    assert prepared.exit_code == 0, prepared.output
    assert prepared.stdout.startswith("59 documents")
    source = f"data.train=[{{path: {tmp_path / 'tokens'}, mode: static}}]"
    tokenizer = f"data.tokenizer={{path: {tmp_path / 'tokenizer'}}}"
    trained = call("train", config, source, tokenizer, f"system.run_dir={tmp_path / 'run'}", "training.steps=1")
    assert trained.exit_code == 0, trained.output


def test_info_solves_a_preset(call: Call) -> None:
    result = call("info", "--preset", "llama", "--params", "10M", "vocab_size=4096", "model.num_hidden_layers=5")
    assert result.exit_code == 0, result.output
    assert "5 layers (5 × attention)" in result.stdout and "from the 10,000,000 asked" in result.stdout
    assert call("info", "--preset", "mamba2", "--json").stdout.startswith("{")
