"""The memory forecast against memory: torch's own allocations, the resident set of real processes, and a GPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.errors import ConfigError
from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.models import account
from fusiontree.train import train
from fusiontree.train.build import build_model, model_config
from fusiontree.train.callbacks import Callback, Snapshot
from fusiontree.train.config import RunConfig
from fusiontree.train.forecast import Forecast, by_stage, forecast
from fusiontree.train.holdings import holdings
from tests.train.live import Live
from tests.train.memory_child import config_of, measured
from tests.train.tiny import tiny_config

WITHIN = 0.15
SMALL: dict[str, Any] = {
    "model__vocab_size": 1024,
    "model__hidden_size": 128,
    "model__num_hidden_layers": 3,
    "model__num_attention_heads": 4,
    "model__sliding_window": 64,
    "model__mamba_d_state": 32,
    "model__mamba_head_dim": 32,
    "model__mamba_chunk_size": 64,
    "model__gate_rank": 16,
    "model__drop_branch_prob": 0.0,
    "training__sequence_length": 256,
    "training__micro_batch_size": 2,
    "training__accumulation_steps": 1,
    "training__save_every": None,
    "training__validation_every": None,
    "data__validation_fraction": 0.0,
}
# Some hundred megabytes, so that what libraries take for themselves in a process does not count: of activations, and
# of weights with what belongs to them.
LONG: dict[str, Any] = {
    **SMALL,
    "model__vocab_size": 4096,
    "model__sliding_window": 128,
    "training__sequence_length": 512,
    "training__micro_batch_size": 5,
}
WIDE: dict[str, Any] = {
    **SMALL,
    "model__vocab_size": 8192,
    "model__hidden_size": 512,
    "training__sequence_length": 128,
    "training__accumulation_steps": 2,
    "training__activation_checkpointing": "branches",
}
STEPS: dict[str, dict[str, Any]] = {
    "fp32": {"training__precision": "fp32"},
    "bf16": {"training__precision": "bf16"},
    "fp32, branches": {"training__activation_checkpointing": "branches"},
    "bf16, branches, untied": {
        "training__precision": "bf16",
        "training__activation_checkpointing": "branches",
        "model__tie_word_embeddings": False,
    },
    "bf16, block": {"training__precision": "bf16", "training__activation_checkpointing": "block"},
    "fp32, block, accumulated": {"training__activation_checkpointing": "block", "training__accumulation_steps": 2},
    "gates decided": {"training__loss": {"entropy_weight": 0.1}},
    "muon": {"training__optimizer": "muon", "training__activation_checkpointing": "block"},
    "pyramid, longer rows": {"model__window_growth": 4, "training__curriculum": [[256, 1], [512, 2]]},
    "validation": {
        "data__validation_fraction": 0.1,
        "model__vocab_size": 60000,
        "training__sequence_length": 512,
        "training__validation_every": 1,
    },
}


class Counted(Callback):
    """The most that tensors take from the first step on."""

    def __init__(self, live: Live, steps: int) -> None:
        self.live, self.steps = live, steps

    def on_start(self, run: Snapshot) -> None:
        self.live.__enter__()

    def on_step(self, run: Snapshot) -> None:
        if run.step == self.steps:
            self.live.__exit__(None, None, None)


def coming(config: RunConfig, processes: int = 1, device: str = "cpu") -> Forecast:
    return forecast(config, model_config(config), processes, device)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_what_torch_allocates(name: str, tmp_path: Path) -> None:
    """Without noise: every tensor that an op makes, from its making to its end."""
    config = tiny_config(tmp_path, **{**SMALL, **STEPS[name], "training__steps": 3})
    model = build_model(config)
    live = Live(model)
    train(config, model=model, callbacks=[Counted(live, 3)], evaluate=evaluate_loss)
    assert coming(config).on_top == pytest.approx(live.peak, rel=0.08)


def test_a_process_takes_what_is_forecast(tmp_path: Path) -> None:
    """The resident set of a process of its own: with what libraries take beside the tensors, and nothing left out."""
    jobs = [
        {**LONG, "training__precision": "fp32"},
        {**LONG, "training__precision": "bf16", "training__micro_batch_size": 8},
    ]
    for number, (job, found) in enumerate(zip(jobs, measured(tmp_path, jobs), strict=True)):
        grown = found["peak"] - found["built"]
        assert grown > 300e6
        expected = coming(config_of(tmp_path / f"job-{number}", job)).on_top
        assert expected == pytest.approx(grown, rel=WITHIN), (job, expected, grown)


def test_processes_that_share_a_model_take_what_is_forecast(tmp_path: Path) -> None:
    """From before the model was built, as an engine divides it then; one host holds what would be offloaded, too."""
    buckets: dict[str, Any] = {"reduce_bucket_size": 2_000_000, "stage3_prefetch_bucket_size": 1_000_000}
    engines: list[dict[str, Any]] = [{"system__engine": "ddp"}, {"system__engine": "fsdp"}]
    for stage in (2, 3):
        (tmp_path / str(stage)).mkdir()
        engines.append(zero(tmp_path / str(stage), stage, **buckets))
    jobs = [{**WIDE, **engine} for engine in engines]
    for number, (job, found) in enumerate(zip(jobs, measured(tmp_path, jobs, processes=2), strict=True)):
        grown = found["peak"] - found["before"]
        expected = coming(config_of(tmp_path / f"job-{number}", job), processes=2)
        assert expected.total + sum(expected.host.values()) == pytest.approx(grown, rel=WITHIN), (job, expected, grown)


def states(changes: dict[str, Any], tmp_path: Path, processes: int = 1) -> Any:
    config = tiny_config(tmp_path, **{**WIDE, **changes})
    return holdings(config, model_config(config), processes, "cpu"), 4 * account(model_config(config)).total_parameters


def zero(tmp_path: Path, stage: int, **settings: Any) -> dict[str, Any]:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **settings}}), encoding="utf-8")
    return {"system__engine": "deepspeed", "system__deepspeed": str(file)}


def test_engines_divide_what_they_say_they_divide(tmp_path: Path) -> None:
    alone, size = states({"system__engine": "single"}, tmp_path)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.host) == (size, size, 2 * size, {})
    copied, _ = states({"system__engine": "ddp"}, tmp_path, 4)
    assert (copied.weights, copied.standing, copied.accumulated) == (size, size, 2 * size)
    divided, _ = states({"system__engine": "fsdp"}, tmp_path, 4)
    assert (divided.weights, divided.gradients, divided.optimizer) == (size // 4, size // 4, size // 2)
    two, _ = states(zero(tmp_path, 2), tmp_path, 4)
    assert (two.weights, two.gradients, two.optimizer) == (size, size // 4, 3 * size // 4)
    three, _ = states(zero(tmp_path, 3), tmp_path, 4)
    assert (three.weights, three.gradients, three.optimizer) == (size // 4, size // 4, 3 * size // 4)


def test_what_is_offloaded_is_the_hosts(tmp_path: Path) -> None:
    host = {"device": "cpu"}
    offloads = {
        "fsdp": {"system__engine": "fsdp", "system__offload": True},
        "zero": zero(tmp_path, 3, offload_optimizer=host, offload_param=host, reduce_bucket_size=1_000_000),
    }
    for name, changes in offloads.items():
        held, size = states(changes, tmp_path, 4)
        assert (held.weights, held.gradients, held.optimizer) == (0, 0, 0), name
        assert held.host["weights"] == size // 4 and sum(held.host.values()) >= size, name
    half, size = states(zero(tmp_path, 2, offload_optimizer=host), tmp_path, 4)
    assert (half.weights, half.optimizer) == (size, 0) and half.host["optimizer"] == 3 * size // 4


def test_the_worst_stage_and_the_more_recomputed_the_less_kept(tmp_path: Path) -> None:
    lengths = tiny_config(
        tmp_path, **{**SMALL, "training__accumulation_steps": 2}, training__curriculum=[[256, 2], [1024, 2], [512, 4]]
    )
    stages = by_stage(lengths, model_config(lengths), 1, "cpu")
    assert [stage.checkpointing for stage in stages if stage.stage.length == 1024] == ["block"]
    assert coming(lengths).total == max(stage.total for stage in stages)
    one, two, three = (
        coming(tiny_config(tmp_path, **{**LONG, "training__activation_checkpointing": mode})).total
        for mode in ("none", "branches", "block")
    )
    assert one > two > three
    halves = coming(tiny_config(tmp_path, **{**LONG, "training__micro_batch_size": 4}), processes=2)
    assert halves.stage.micro_batch_size == 2


def test_what_cannot_be_run_is_not_forecast(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divided among 3 processes"):
        coming(tiny_config(tmp_path, **SMALL), processes=3)
    with pytest.raises(ConfigError, match="single is one process"):
        coming(tiny_config(tmp_path, **{**SMALL, "system__engine": "single"}), processes=2)


def test_a_teacher_costs_its_weights_and_all_logits(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SMALL)
    model = model_config(config)
    alone, taught = forecast(config, model, device="cpu"), forecast(config, model, device="cpu", teacher=model)
    size = 4 * account(model).total_parameters
    logits = config.training.sequence_length * config.training.micro_batch_size * model.vocab_size * 4
    assert taught.total > alone.total + size + 3 * logits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", ["none", "branches", "block"])
def test_a_gpu_takes_what_is_forecast(checkpointing: str, tmp_path: Path) -> None:
    job = {
        **LONG,
        "training__precision": "bf16",
        "training__micro_batch_size": 8,
        "training__activation_checkpointing": checkpointing,
        "system__device": "cuda",
    }
    found = measured(tmp_path, [job])[0]
    expected = coming(config_of(tmp_path / "job-0", job), device="cuda").on_top
    assert expected == pytest.approx(found["peak"] - found["built"], rel=WITHIN)
