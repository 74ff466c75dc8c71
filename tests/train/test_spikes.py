"""Loss spikes: told with the text of the step, stopped at where asked, and the same after a resume."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import TrainingError
from fusiontree.train import Callback, train
from fusiontree.train.build import build_model
from fusiontree.train.checkpoint import list_checkpoints
from fusiontree.train.config import TrainingSection
from fusiontree.train.jsonl import JsonLines
from fusiontree.train.spikes import LEAST, NAMED, WINDOW, Spike, SpikeGuard
from tests.train.test_resume import StopAfter
from tests.train.tiny import lines, tiny_config


def guard(folder: Path, **settings: Any) -> SpikeGuard:
    section = TrainingSection(steps=1000, sequence_length=8, micro_batch_size=1, **settings)
    return SpikeGuard(section, JsonLines(folder / "spikes.jsonl"))


def noisy(seed: int, count: int, level: float = 3.0, noise: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [level + noise * draw.gauss(0, 1) for _ in range(count)]


def test_a_usual_run_has_no_spikes(tmp_path: Path) -> None:
    """Falling losses, noise, and rows so short that the loss is often more than half as much again."""
    falling = [3 + 7 * math.exp(-step / 100) for step in range(500)]
    wild = noisy(1, 500, level=1.0, noise=0.3)
    assert sum(loss > 1.5 for loss in wild) > 20
    for losses in (falling, noisy(0, 500), wild):
        watch = guard(tmp_path)
        assert [step for step, loss in enumerate(losses) if watch.see(step, loss, 1.0)] == []


@pytest.mark.parametrize(("loss", "found"), [(4.4, False), (4.7, True), (300.0, True)])
def test_a_spike_is_far_above_the_usual(tmp_path: Path, loss: float, found: bool) -> None:
    watch = guard(tmp_path)
    for step, usual in enumerate(noisy(0, 100), 1):
        assert watch.see(step, usual, 0.5) is None
    spike = watch.see(101, loss, 8.0)
    assert (spike is not None, watch.count) == (found, int(found))
    if spike is not None:
        assert spike.usual_loss == pytest.approx(3.0, abs=0.05) and spike.usual_grad_norm == 0.5
        assert spike.size == pytest.approx(loss / spike.usual_loss)


def test_spikes_do_not_move_what_is_usual_but_a_new_level_does(tmp_path: Path) -> None:
    watch = guard(tmp_path)
    for step, loss in enumerate(noisy(0, WINDOW)):
        watch.see(step, loss, 1.0)
    assert [watch.see(100 + i, 30.0, 1.0) is not None for i in range(10)] == [True] * 10
    told = sum(watch.see(200 + i, 30.0, 1.0) is not None for i in range(WINDOW))
    assert 0 < told < WINDOW / 2
    assert watch.see(300, 30.0, 1.0) is None


def test_nothing_is_usual_at_first_and_what_is_not_finite_never(tmp_path: Path) -> None:
    watch = guard(tmp_path)
    assert [watch.see(step, 10.0**step, 1.0) for step in range(LEAST)] == [None] * LEAST
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1e30, math.inf)):
        assert watch.see(50, loss, norm) is None
    assert watch.see(51, 1e30, 1.0) is not None
    assert not any(math.isinf(value) for value in [*watch.losses, *watch.norms])


def test_the_state_goes_through_json_and_on_exactly(tmp_path: Path) -> None:
    first, second = guard(tmp_path), guard(tmp_path)
    for step, loss in enumerate([*noisy(0, 100), 9.0]):
        first.see(step, loss, loss / 7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, loss in enumerate([*noisy(1, 30), 5.0, *noisy(2, WINDOW), 4.8], 101):
        assert first.see(step, loss, loss / 7) == second.see(step, loss, loss / 7)
    assert first.state_dict() == second.state_dict() and first.count == 3


def test_the_settings_decide(tmp_path: Path) -> None:
    watch = guard(tmp_path, spike_factor=50.0, spike_stop=200.0)
    for step in range(20):
        watch.see(step, 2.0, 1.0)
    small, large = watch.see(20, 120.0, 1.0), watch.see(21, 400.0, 1.0)
    assert watch.see(22, 90.0, 1.0) is None and small is not None and large is not None
    assert (watch.ends_the_run(small), watch.ends_the_run(large)) == (False, True)
    assert not guard(tmp_path).ends_the_run(large)


def test_the_line_names_some_documents_and_the_file_all(tmp_path: Path) -> None:
    watch, spike = guard(tmp_path), Spike(7, 200.0, 2.0, 90.0, 1.5)
    line = watch.tell(spike, range(40, 44), lambda sample: [f"a.txt:{sample}", f"b.txt:{2 * sample}", "c.txt:1"])
    assert line.startswith(
        "loss spike at step 7: 200.0000, 100.0 times the usual 2.0000 (gradient norm 90, usually 1.5"
    )
    assert "samples 40 to 43: a.txt:40, b.txt:80, c.txt:1, a.txt:41, b.txt:82, a.txt:42 and 3 more in " in line
    assert "training.lr" in line and "\n" not in line
    (written,) = [json.loads(text) for text in watch.file.path.read_text(encoding="utf-8").splitlines()]
    assert written["samples"] == [40, 41, 42, 43] and len(written["documents"]) == 9 > NAMED
    assert (written["step"], written["loss"], written["usual_loss"]) == (7, 200.0, 2.0)


class Bump(Callback):
    """Makes the loss of one step a hundred times as large; remembers which samples were in it."""

    name = "bump"

    def __init__(self, model: Any, step: int) -> None:
        self.step, self.now, self.samples = step, 0, []  # type: tuple[int, int, list[int]]
        model.register_forward_hook(self._forward)

    def on_start(self, run: Any) -> None:
        self.now = run.step + 1

    def _forward(self, module: Any, inputs: Any, out: Any) -> Any:
        if module.training and self.now == self.step:
            out["loss"] = out.loss * 100
        return out

    def on_forward(self, step: int, batch: Any, out: Any) -> None:
        if step == self.step:
            self.samples += batch["sample_ids"]

    def wants_gates(self, step: int) -> bool:
        return True

    def on_step(self, run: Any) -> None:
        self.now = run.step + 1


@pytest.fixture
def bumped(tmp_path: Path) -> Callable[..., Any]:
    """Train for twelve steps, the tenth of which has a spike; gives the samples of that step."""

    def run(folder: str, *callbacks: Callback, **changes: Any) -> list[int]:
        settings = {"training__steps": 12, "training__save_every": 4, "training__validation_every": None, **changes}
        config = tiny_config(tmp_path, system__run_dir=str(tmp_path / folder), logging__console="plain", **settings)
        model = build_model(tiny_config(tmp_path, model__vocab_size=258, **settings))
        bump = Bump(model, 10)
        train(config, model=model, callbacks=[bump, *callbacks])
        return bump.samples

    return run


@pytest.mark.fault(row=22)
def test_a_spike_is_told_and_the_run_goes_on(
    tmp_path: Path, bumped: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = bumped("run")
    run = tmp_path / "run"
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "spike" in line]
    assert warning.startswith("warning: loss spike at step 10: ") and f"{tmp_path / 'text.txt'}:" in warning
    assert f"samples {samples[0]} to {samples[-1]}: " in warning
    (told,) = lines(run, "spikes.jsonl")
    assert told["step"] == 10 and told["samples"] == samples and 50 < told["loss"] / told["usual_loss"] < 150
    counts = [line["spikes"] for line in lines(run) if "loss" in line]
    assert counts == [0] * 9 + [1] * 3
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["spikes"] == 1
    text = (tmp_path / "text.txt").read_text(encoding="utf-8").splitlines()
    for place in told["documents"]:
        assert text[int(place.rpartition(":")[2]) - 1]


@pytest.mark.fault(row=22)
def test_a_resumed_run_tells_the_same_spike_once(tmp_path: Path, bumped: Callable[..., Any]) -> None:
    bumped("whole")
    bumped("parts", StopAfter(11), training__save_every=None)
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000011"
    assert json.loads((checkpoint / "trainer" / "state.json").read_text())["callbacks"]["spikes"]["count"] == 1
    bumped("parts", training__save_every=None)
    assert lines(tmp_path / "parts", "spikes.jsonl") == lines(tmp_path / "whole", "spikes.jsonl") != []
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.fault(row=22)
def test_a_run_may_stop_at_a_spike_and_go_on_from_the_checkpoint_before(
    tmp_path: Path, bumped: Callable[..., Any]
) -> None:
    with pytest.raises(TrainingError) as caught:
        bumped("run", training__spike_stop=50.0)
    message = str(caught.value)
    for part in ("loss spike at step 10", "step-00000008", "training.spike_stop"):
        assert part in message
    assert "\n" not in message
    run = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000004", "step-00000008"]
    bumped("run")  # no longer asked to stop
    assert [line["step"] for line in lines(run, "spikes.jsonl")] == [10]
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 13))
