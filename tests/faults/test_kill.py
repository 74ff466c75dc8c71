"""Row 1: a process killed while it saves. What is found afterwards is whole, and the run goes on as if never killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.train import latest_checkpoint, train
from fusiontree.train.checkpoint import list_checkpoints, step_folder, verify
from tests.faults.disk import Moment, die, record
from tests.faults.process import Child, call
from tests.train.tiny import lines, state_hashes, tiny_config, tiny_file

STEPS = 6
SWEEP = {"training__steps": STEPS, "training__save_every": 1, "training__validation_every": None}
KILLED = 2  # the step whose save is cut short


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_config(folder, **SWEEP), evaluate=evaluate_loss)
    return folder / "run"


def assert_nothing_half(run: Path) -> int:
    """Every folder with a checkpoint's name is a whole one; gives the newest step, 0 without any."""
    for folder in list_checkpoints(run / "checkpoints"):
        verify(folder)
    newest = latest_checkpoint(run)
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def assert_goes_on_to_the_same_end(folder: Path, whole: Path) -> None:
    train(tiny_config(folder, **SWEEP), evaluate=evaluate_loss)
    assert not list((folder / "run" / "checkpoints").glob("*.tmp"))
    assert state_hashes(folder / "run") == state_hashes(whole) != {}
    assert lines(folder / "run") == lines(whole)


@pytest.mark.fault(row=1)
@pytest.mark.parametrize("number", range(20))
def test_sigkill_at_20_delays_after_a_save_began(
    tmp_path: Path, whole: Path, number: int, fault_figure: Callable[..., None]
) -> None:
    """The delays sweep from nothing to a little more than a save takes on an idle machine (about 20 ms)."""
    step = 1 + number % (STEPS - 1)
    draft = tmp_path / "run" / "checkpoints" / f"step-{step:08d}.tmp"
    with Child(["train", tiny_file(tmp_path, **SWEEP)], tmp_path / "out.txt") as child:
        child.until(lambda: draft.exists() or draft.with_suffix("").exists())
        time.sleep(number * 0.0015)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    cut = draft.exists() or bool(list(draft.parent.glob("*.tmp")))
    assert assert_nothing_half(tmp_path / "run") >= step - 1
    assert_goes_on_to_the_same_end(tmp_path, whole)
    fault_figure("kills", 1)
    fault_figure("kills that left a half-written folder", int(cut))


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
    """What a save does to the disk, in order."""
    folder = tmp_path_factory.mktemp("moments")
    log = folder / "moments.txt"
    words = ["train", tiny_file(folder, **SWEEP)]
    code, output = call(words, folder / "out.txt", partial(record, log, KILLED))
    assert code == 0, output
    found = (line.partition(" ") for line in log.read_text(encoding="utf-8").splitlines())
    return [(kind, name) for kind, _, name in found]


@pytest.mark.fault(row=1)
def test_a_save_writes_seals_syncs_renames_and_syncs_again(moments: list[Moment], whole: Path) -> None:
    writes = [number for number, (kind, _) in enumerate(moments) if kind == "write"]
    assert moments[writes[-1]] == ("write", "manifest.json")
    assert writes[-1] < moments.index(("sync", "manifest.json"))
    assert moments[-2:] == [("rename", "folder"), ("sync", "checkpoints")]
    folder = step_folder(whole / "checkpoints", KILLED)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files | {"trainer", "folder"} == {name for kind, name in moments[:-1] if kind == "sync"}


@pytest.mark.fault(row=1)
@pytest.mark.parametrize("part", range(4))
def test_death_before_every_write_sync_and_rename_of_a_save(
    tmp_path: Path, whole: Path, moments: list[Moment], part: int, fault_figure: Callable[..., None]
) -> None:
    for number in range(part, len(moments), 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare = partial(die, KILLED, number)
        code, output = call(["train", tiny_file(folder, **SWEEP)], folder / "out.txt", prepare)
        assert code == 9, (moments[number], output)
        renamed = number == len(moments) - 1
        assert assert_nothing_half(folder / "run") == (KILLED if renamed else KILLED - 1), moments[number]
        assert_goes_on_to_the_same_end(folder, whole)
        fault_figure("deaths injected into a save", 1)
