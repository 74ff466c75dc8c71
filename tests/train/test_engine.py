"""The engine: what a run leaves behind, accumulation, guards against bad numbers, distillation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusiontree import HybridLanguageModel
from fusiontree.errors import CheckpointError, ConfigError, DataError, TrainingError
from fusiontree.train import Callback, latest_checkpoint, train
from fusiontree.train.build import build_model
from fusiontree.train.checkpoint import list_checkpoints
from fusiontree.train.config import load_config
from fusiontree.train.model_files import StateStream
from tests.train.tiny import lines, tiny_config


def test_a_run_leaves_everything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, logging__tensorboard=True, logging__console="plain", training__steps=4)
    result = train(config)
    run = tmp_path / "run"
    assert (result.run_dir, result.step, result.interrupted) == (run, 4, False)
    assert result.validation_loss_before == pytest.approx(math.log(258), abs=0.2)
    assert result.validation_loss_after < result.validation_loss_before  # type: ignore[operator]
    assert result.best == {"step": 4, "validation_loss": result.validation_loss_after}
    training = [line for line in lines(run) if "loss" in line]
    names = {
        "step",
        "loss",
        "lm_loss",
        "balance_loss",
        "entropy_loss",
        "gate_mean",
        "lr",
        "grad_norm",
        "spikes",
        "tokens",
    }
    assert [set(line) for line in training] == [names] * 4
    assert result.final_loss == training[-1]["loss"]
    measured = [line for line in lines(run) if "validation_loss" in line]
    assert [line["step"] for line in measured] == [0, 4]
    assert measured[0]["validation_perplexity"] == pytest.approx(math.exp(measured[0]["validation_loss"]))
    assert [line["step"] for line in lines(run, "gates.jsonl")] == [2, 4]
    assert load_config(run / "config.yaml") == config
    assert list((run / "tensorboard").iterdir())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["step"] == 4 and summary["bad_records"]["count"] == 0
    printed = capsys.readouterr().out
    assert "step 4/4  loss" in printed and "tok/s" in printed and "eta" in printed


def test_a_checkpoint_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, training__steps=2))
    folder = latest_checkpoint(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, HybridLanguageModel) and model.dtype == torch.float32
    ids = tokenizer("the gate", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """Rows without packing differ in length: only a mean by real tokens, not by micro-batch, gives the same step."""
    weights = {}
    for name, rows, count in (("large", 4, 1), ("small", 1, 4)):
        changes = {"training__micro_batch_size": rows, "training__accumulation_steps": count}
        train(
            tiny_config(
                tmp_path,
                **changes,
                training__steps=2,
                training__loss={"balance_weight": 0.0},
                data__packing=False,
                data__num_workers=0,
                model__drop_branch_prob=0.0,
                training__eps=1e-3,  # AdamW divides tiny gradients by their own size: rounding would show
                system__run_dir=str(tmp_path / name),
            )
        )
        weights[name] = load_file(latest_checkpoint(tmp_path / name) / "model.safetensors")  # type: ignore[operator]
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in weights]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights["large"].items():
        torch.testing.assert_close(tensor, weights["small"][name], rtol=1e-4, atol=1e-5)


class Poison(Callback):
    """Puts NaN into one weight's gradient, or into the loss, at the given steps."""

    name = "poison"

    def __init__(self, model: Any, steps: set[int], where: str) -> None:
        self.steps, self.where, self.now = steps, where, 1
        model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * self.factor("gradient"))
        model.register_forward_hook(self._forward)
        self.weights: dict[int, Any] = {}
        self.model = model

    def factor(self, where: str) -> float:
        return math.inf if where == self.where and self.now in self.steps else 1.0

    def _forward(self, module: Any, inputs: Any, out: Any) -> Any:
        if module.training and self.factor("loss") == math.inf:
            out["loss"] = out.loss * math.nan
        return out

    def on_step(self, run: Any) -> None:
        self.weights[run.step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.now = run.step + 1


@pytest.mark.fault(row=20)
@pytest.mark.fault(row=21)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path: Path, where: str) -> None:
    config = tiny_config(tmp_path)
    model = build_model(tiny_config(tmp_path, model__vocab_size=258))
    poison = Poison(model, {4}, where)
    with pytest.raises(TrainingError) as caught:
        train(config, model=model, callbacks=[poison])
    message = str(caught.value)
    assert "step 4" in message and "not updated" in message and "step-00000002" in message and "\n" not in message
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, poison.weights[3][name]), name
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


@pytest.mark.fault(row=20)
def test_bad_steps_can_be_skipped_up_to_a_limit(tmp_path: Path) -> None:
    model = build_model(tiny_config(tmp_path, model__vocab_size=258))
    poison = Poison(model, {3, 4, 6}, "loss")
    result = train(tiny_config(tmp_path, training__max_skipped_steps=2), model=model, callbacks=[poison])
    assert result.step == 8
    for step, name in ((3, "model.layers.0.fusion_proj.weight"), (4, "model.embed_tokens.weight")):
        assert torch.equal(poison.weights[step][name], poison.weights[2][name])
    assert not torch.equal(
        poison.weights[5]["model.embed_tokens.weight"], poison.weights[4]["model.embed_tokens.weight"]
    )
    assert [line["loss"] is None for line in lines(tmp_path / "run") if "loss" in line].count(True) == 3


@pytest.mark.fault(row=21)
def test_three_bad_steps_in_a_row_are_too_many_for_two(tmp_path: Path) -> None:
    model = build_model(tiny_config(tmp_path, model__vocab_size=258))
    with pytest.raises(TrainingError, match="step 5"):
        train(
            tiny_config(tmp_path, training__max_skipped_steps=2),
            model=model,
            callbacks=[Poison(model, {3, 4, 5}, "gradient")],
        )


def test_a_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    loss = {"distill_weight": 1.0, "balance_weight": 0.0}
    teacher = build_model(tiny_config(tmp_path, model__vocab_size=258, system__seed=5))
    config = tiny_config(tmp_path, training__loss=loss, model__drop_branch_prob=0.0)
    train(config, teacher=teacher)
    distances = [line["distill_loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert len(distances) == 8 and all(value > 0 for value in distances)
    first = next(line for line in lines(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(first["lm_loss"] + first["distill_loss"], rel=1e-5)
    assert all(not parameter.requires_grad for parameter in teacher.parameters())


def test_teacher_and_weight_go_together(tmp_path: Path) -> None:
    teacher = build_model(tiny_config(tmp_path, model__vocab_size=258))
    with pytest.raises(ConfigError, match="distill_weight"):
        train(tiny_config(tmp_path), teacher=teacher)
    with pytest.raises(ConfigError, match="distill_weight"):
        train(tiny_config(tmp_path, training__loss={"distill_weight": 1.0}))


def test_a_handed_in_evaluation_replaces_ours(tmp_path: Path) -> None:
    seen: list[tuple[bool, int]] = []

    def evaluate(model: Any, batches: Any) -> Any:
        seen.append((model.training, len(list(batches))))
        return SimpleNamespace(loss=1.5)

    result = train(tiny_config(tmp_path, training__steps=2, training__validation_every=1), evaluate=evaluate)
    assert seen == [(False, 2)] * 3
    assert (result.validation_loss_before, result.validation_loss_after) == (1.5, 1.5)


def test_selective_recomputation_gives_the_same_numbers(tmp_path: Path) -> None:
    losses = []
    for mode in ("none", "branches", "block"):
        run = tmp_path / mode
        train(tiny_config(tmp_path, training__activation_checkpointing=mode, system__run_dir=str(run)))
        losses.append([line["loss"] for line in lines(run) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_branch_dropout_works_in_bf16(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, model__drop_branch_prob=0.9, training__precision="bf16"))
    assert result.step == 8 and result.final_loss is not None and math.isfinite(result.final_loss)


def test_gates_have_two_phases(tmp_path: Path) -> None:
    """With a hinge that can never be met the loss shows it, until the balance phase is over."""
    loss = {"balance_weight": 1.0, "balance_target": 1.0, "balance_margin": 0.0, "specialise_after": 0.5}
    train(tiny_config(tmp_path, training__loss=loss))
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    extra = [line["loss"] - line["lm_loss"] for line in found]
    assert extra[:4] == pytest.approx([line["balance_loss"] for line in found[:4]], abs=1e-5)
    assert extra[4:] == pytest.approx([0.0] * 4, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"model__vocab_size": 100}, DataError, "vocab"),
        ({"data__train": []}, DataError, "no sources"),
        ({"data__train": [{"path": "/none/*.txt"}]}, DataError, "/none"),
        ({"training__micro_batch_size": 10_000}, DataError, "batch size"),
    ],
)
def test_impossible_runs_are_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        train(tiny_config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(error, match=expected):
        train(tiny_config(tmp_path, **changes))
    assert (tmp_path / "run" / "notes.txt").exists()


@pytest.mark.fault(row=5)
def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"system\.run_dir"):
        train(tiny_config(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"system\.device"):
        train(tiny_config(tmp_path, system__device="cuda"))


def test_a_missing_optional_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging\.wandb: the package wandb"):
        train(tiny_config(tmp_path, logging__wandb=True))


@pytest.mark.fault(row=26)
def test_running_out_of_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(self: Any, *_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("fusiontree.train.strategies.SingleProcess.backward", hungry)
    with pytest.raises(TrainingError, match=r"step 1: out of memory.*none yet.*micro_batch_size"):
        train(tiny_config(tmp_path))


@pytest.mark.fault(row=4)
def test_a_disk_that_fills_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: Path) -> None:
        if folder.name.startswith("step-00000004"):
            raise OSError(28, "No space left on device")
        original(self, folder)

    original = StateStream.write
    monkeypatch.setattr(StateStream, "write", full)
    with pytest.raises(CheckpointError, match=r"step-00000004: .*No space left"):
        train(tiny_config(tmp_path))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
