"""Weights & Biases for real, offline: what the client wrote to disk is read back, before and after a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import ConfigError
from fusiontree.train import train
from tests.train.test_resume import StopAfter
from tests.train.tiny import TIMES, lines, tiny_config

wandb = pytest.importorskip("wandb", reason="wandb is not installed")

HEADER, BLOCK = 7, 32768  # of the client's file: LevelDB's log format, after a header of its own
BEGINS, ENDS = (1, 2), (1, 4)


def records(path: Path) -> list[tuple[str, Any]]:
    """Kind and record of all in a .wandb file, once its client has written the last, how the run ended."""
    for _ in range(600):
        found = [(str(record.WhichOneof("record_type")), record) for record in scan(path)]
        if found and found[-1][0] == "exit":
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{path} is not finished")


def scan(path: Path) -> Iterator[Any]:
    """The records so far; each is cut into pieces with checksum (4), length (2) and kind (1) before them."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, piece = path.read_bytes(), HEADER, b""
    assert content[:4] in (b":W&B", b"")
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # a piece never begins in the last bytes of a block
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        body = content[place + HEADER : place + HEADER + length]
        if len(body) < length:
            return
        piece, place = body if kind in BEGINS else piece + body, place + HEADER + length
        if kind in ENDS:
            yield Record.FromString(piece)


def history(path: Path) -> dict[int, dict[str, Any]]:
    """Step -> figures, in the order in which they were logged; the client's own keys begin with _."""
    found: dict[int, dict[str, Any]] = {}
    for kind, record in records(path):
        if kind == "history":
            named = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            figures = {key: json.loads(value) for key, value in named if not key.startswith("_")}
            found[record.history.step.num] = figures
    return found


def expected(run: Path) -> dict[int, dict[str, Any]]:
    """What metrics.jsonl has, one entry per step."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines(run):
        found.setdefault(line["step"], {}).update({key: value for key, value in line.items() if key != "step"})
    return found


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[None]:
    """The client keeps a process of its own, and what it read from the environment, until it is told to go."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"logging__wandb": True, "logging__wandb_project": "mine", "training__save_every": None}
    train(tiny_config(tmp_path, **settings), callbacks=[StopAfter(5)])
    train(tiny_config(tmp_path, **settings))
    first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    opened = [next(record.run for kind, record in records(path) if kind == "run") for path in (first, second)]
    assert opened[0].run_id == opened[1].run_id
    assert {(one.project, one.display_name) for one in opened} == {("mine", "run")}
    configured = {update.key: json.loads(update.value_json) for update in opened[1].config.update}
    assert configured["training"]["steps"] == 8
    before, after = history(first), history(second)
    assert (list(before), list(after)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    whole = {
        step: {key: value for key, value in figures.items() if key not in TIMES}
        for step, figures in (before | after).items()
    }
    assert whole == expected(run)
    assert {"loss", "validation_loss", "gate_mean", "grad_norm"} <= set(whole[8])


def test_a_failed_run_is_closed_as_failed(tmp_path: Path) -> None:
    class Fails(StopAfter):
        def on_step(self, run: Any) -> None:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        train(tiny_config(tmp_path, logging__wandb=True), callbacks=[Fails(1)])
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert records(path)[-1][1].exit.exit_code == 1


def test_a_missing_key_is_one_line_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")  # as the client does; which way to go it asks only once

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"logging\.wandb: No API key.*WANDB_MODE=offline") as caught:
        train(tiny_config(tmp_path, logging__wandb=True))
    assert "\n" not in str(caught.value)
    assert not lines(tmp_path / "run")
