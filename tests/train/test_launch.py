"""How processes are started and stopped, and what is refused before they train."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.errors import ConfigError
from fusiontree.models import HybridLanguageModel, compile_blocks
from fusiontree.train import latest_checkpoint, train
from fusiontree.train.strategies import build_strategy
from tests.train.tiny import lines, tiny_config, tiny_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/run_pretrain.sh"
FOUR_ROWS = {"training__micro_batch_size": 2, "training__accumulation_steps": 2}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process writes to metrics.jsonl."""
    folder = tmp_path_factory.mktemp("alone")
    train(tiny_config(folder, **FOUR_ROWS, model__drop_branch_prob=0.0))
    return lines(folder / "run")


def assert_as_alone(run_dir: Path, alone: list[dict[str, Any]]) -> None:
    found = lines(run_dir)
    assert len(found) == len(alone)
    for one, other in zip(alone, found, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_machines_meet(tmp_path: Path, alone: list[dict[str, Any]]) -> None:
    """Two agents with a process each find each other at one address, as on two machines."""
    config = tiny_file(tmp_path, **FOUR_ROWS, model__drop_branch_prob=0.0)
    meeting = {"NNODES": "2", "RDZV": f"localhost:{free_port()}", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), str(config), "1"]
    agents = [
        subprocess.Popen(
            command, env=environment(**meeting), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert_as_alone(tmp_path / "run", alone)


@pytest.mark.fault(row=2)
@pytest.mark.slow
def test_the_script_hands_a_signal_on_and_goes_on_later(tmp_path: Path, alone: list[dict[str, Any]]) -> None:
    """SIGTERM to the script: both processes finish the same step, one checkpoint is whole, the rest comes later."""
    config = tiny_file(tmp_path, **FOUR_ROWS, model__drop_branch_prob=0.0, system__engine="ddp")
    command = ["bash", str(SCRIPT), str(config), "2"]
    first = subprocess.Popen([*command, "logging.console=plain"], env=environment(), stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step 2/"):
            first.send_signal(signal.SIGTERM)
            break
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    step = latest_checkpoint(tmp_path / "run")
    assert step is not None and 2 <= int(step.name.split("-")[1]) < 8, output
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))
    second = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr
    assert_as_alone(tmp_path / "run", alone)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize(
    "arguments", [[], ["no.yaml", "2"], [str(ROOT / "configs/demo.yaml")], [str(ROOT / "configs/demo.yaml"), "0"]]
)
def test_the_script_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: scripts/run_pretrain.sh CONFIG NPROC")


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        build_strategy(tiny_config(folder, **changes), torch.device("cpu"))
    return str(error.value)


def test_one_process_is_not_started_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "system.engine: single is one process, but 2 were started" in refused(tmp_path, system__engine="single")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "zero_optimization.stage: must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "optimizer: is said by the run's own settings"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    message = refused(tmp_path, system__engine="deepspeed", system__deepspeed=str(path))
    assert str(path) in message and said in message


def test_engines_and_their_settings_go_together(tmp_path: Path) -> None:
    for changes, said in (
        ({"system__engine": "deepspeed"}, "system.deepspeed: names the JSON file"),
        ({"system__deepspeed": "zero.json"}, "system.deepspeed: names the JSON file"),
        ({"system__offload": True}, "system.offload: needs system.engine=fsdp, not auto"),
        ({"training__teacher": "somewhere"}, "teacher: needs loss.distill_weight above 0"),
    ):
        with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
            tiny_config(tmp_path, **changes)


def test_rows_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    stages = tiny_config(tmp_path, **FOUR_ROWS).training.stages
    assert [(stage.micro_batch_size, stage.accumulation_steps) for count in (1, 2, 4) for stage in stages(count)] == [
        (2, 2),
        (2, 1),
        (1, 1),
    ]
    with pytest.raises(ConfigError, match=r"the 4 rows of 32 tokens .* cannot be divided among 3 processes"):
        stages(3)


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    taught = {"training__loss": {"distill_weight": 1.0}}
    with pytest.raises(ConfigError, match=r"training\.teacher: .*config\.json is missing"):
        train(tiny_config(tmp_path, training__teacher=str(tmp_path), **taught))
    train(tiny_config(tmp_path, training__steps=1, training__warmup_steps=0, system__run_dir=str(tmp_path / "other"),
                      data__tokenizer={"train_vocab_size": 300}))  # fmt: skip
    teacher = latest_checkpoint(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"training\.teacher: .*another tokenizer"):
        train(tiny_config(tmp_path, training__teacher=str(teacher), **taught))


def test_divided_weights_may_rest_in_the_hosts_memory(tmp_path: Path, alone: list[dict[str, Any]]) -> None:
    """FSDP with offload, in a group of one process."""
    train(tiny_config(tmp_path, **FOUR_ROWS, model__drop_branch_prob=0.0, system__engine="fsdp", system__offload=True))
    assert_as_alone(tmp_path / "run", alone)


def test_fp16_halves_its_loss_scale_until_the_gradients_fit(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, training__precision="fp16", training__steps=20, training__save_every=10))
    assert result.final_loss is not None and result.final_loss < 4
    folder = latest_checkpoint(tmp_path / "run")
    assert folder is not None
    scale = json.loads((folder / "trainer/state.json").read_text())["progress"]["loss_scale"]["value"]
    assert 1 <= scale <= 2.0**16
    resumed = train(tiny_config(tmp_path, training__precision="fp16", training__steps=22, training__save_every=10))
    assert resumed.step == 22


def test_compiled_blocks_train_the_same(
    tmp_path: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_quickly(model: HybridLanguageModel) -> None:
        compiled.append(model)
        compile_blocks(model, "aot_eager")

    monkeypatch.setattr("fusiontree.train.engine.compile_blocks", compile_quickly)
    train(tiny_config(tmp_path, **FOUR_ROWS, model__drop_branch_prob=0.0, training__compile=True))
    assert len(compiled) == 1
    assert_as_alone(tmp_path / "run", alone)
