"""Rows 6, 7 and 8: a real checkpoint cut short, with a bit flipped, or with a manifest that lies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fusiontree.errors import CheckpointError
from fusiontree.models.loading import load_model
from fusiontree.models.manifest import MANIFEST, verify
from fusiontree.train import latest_checkpoint, train
from tests.faults.process import call
from tests.train.tiny import state_hashes, tiny_config, tiny_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of checkpoints 2, 4, 6 and 8; tests copy it."""
    folder = tmp_path_factory.mktemp("made")
    train(tiny_config(folder))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def same_text(made: Path) -> dict[str, Any]:
    """The setting that a copied run needs to be the run it was."""
    return {"data__train": [{"path": str(made / "text.txt"), "separator": "\n\n"}]}


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000008"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


@pytest.mark.fault(row=6)
def test_50_cuts_of_any_file_fall_back_to_the_step_before(run: Path, fault_figure: Callable[..., None]) -> None:
    folder, draw = newest(run), random.Random(0)
    paths = [path for path in files_of(folder) if path.stat().st_size]
    for number in range(50):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        path.write_bytes(whole[: draw.randrange(len(whole))])
        told: list[str] = []
        assert latest_checkpoint(run, told.append) == folder.with_name("step-00000006")
        (line,) = told
        assert path.relative_to(folder).as_posix() in line and "step-00000008" in line and "\n" not in line
        if path.name == "model.safetensors":
            with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes"):
                load_model(folder)
        path.write_bytes(whole)
    assert latest_checkpoint(run) == folder
    fault_figure("cuts noticed", 50)


@pytest.mark.fault(row=6)
def test_a_run_goes_on_from_the_step_before_a_cut_one(run: Path, made: Path) -> None:
    path = newest(run) / "trainer" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    config = tiny_file(run.parent, logging__console="plain", **same_text(made))
    code, output = call(["train", config], run.parent / "out.txt")
    assert code == 0, output
    assert "warning" in output and "step-00000008" in output and "going on from step 6" in output
    assert state_hashes(run) == state_hashes(made / "run") != {}


@pytest.mark.fault(row=6)
def test_without_any_whole_step_the_run_is_refused_and_nothing_is_touched(run: Path) -> None:
    for path in run.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = sorted(path for path in run.rglob("*") if path.is_file())
    for words in (["train", tiny_file(run.parent)], ["generate", run, "--prompt", "a"], ["info", newest(run)]):
        code, output = call(words, run.parent / "out.txt")
        assert words[0] == "info" or (code == 2 and "error: " in output and "Traceback" not in output), output
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


@pytest.mark.fault(row=7)
def test_50_flipped_bits_in_the_weights_are_noticed_wherever_they_are_loaded(
    run: Path, fault_figure: Callable[..., None]
) -> None:
    """safetensors takes each of these files as it is."""
    folder, draw = newest(run), random.Random(0)
    files = [folder / "model.safetensors", folder / "trainer" / "optimizer.safetensors"]
    silent = 0
    for number in range(50):
        path = files[number % 2]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(len(data) * 3 // 4, len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        silent += bool(load_file(path))
        assert latest_checkpoint(run) == folder.with_name("step-00000006")
        if path == files[0]:
            with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
                load_model(folder)
        path.write_bytes(whole)
    load_model(folder)
    assert silent == 50
    fault_figure("flipped bits noticed", 50)
    fault_figure("flipped bits that safetensors alone loads", silent)


@pytest.mark.fault(row=7)
def test_a_flipped_bit_is_one_line_on_the_command_line(run: Path) -> None:
    path = newest(run) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    code, output = call(["generate", newest(run), "--prompt", "a"], run.parent / "out.txt")
    assert code == 2
    assert output.startswith(f"error: {newest(run)}: damaged: the content of model.safetensors"), output
    code, output = call(["generate", run, "--prompt", "a", "--max-new-tokens", "2"], run.parent / "out.txt")
    assert code == 0 and "trying the checkpoint before it" in output


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who knows how it is sealed."""
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("seal")
    change(content)
    content["seal"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")


def move_out(folder: Path, name: str) -> None:
    """Put a link in the place of a file or folder that now lies elsewhere."""
    elsewhere = folder.parent.parent / "elsewhere"
    os.replace(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)


def replace_by_link(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    os.replace(folder, elsewhere)
    folder.symlink_to(elsewhere)


def replace_by_pipe(folder: Path) -> None:
    """Reading it would wait for ever."""
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / MANIFEST).write_bytes(b""), "damaged"),
    "half a manifest": (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:200]), "damaged"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "not a fusiontree-checkpoint manifest"),
    "not text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "too deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "damaged"),
    "deep, but readable": (lambda f: (f / MANIFEST).write_text('{"format":' * 900 + "1" + "}" * 900), "manifest"),
    "a long number": (lambda f: (f / MANIFEST).write_text("9" * 5000), "damaged"),
    "a huge file": (lambda f: os.truncate(f / MANIFEST, 10**10), "more than"),
    "edited": (lambda f: _edit(f, "step", 99), "changed after it was written"),
    "another version": (lambda f: reseal(f, lambda m: m.update(version=2)), "version 2 is not supported"),
    "no files": (lambda f: reseal(f, lambda m: m.pop("files")), "size and SHA-256"),
    "files are a list": (lambda f: reseal(f, lambda m: m.update(files=[1])), "size and SHA-256"),
    "files are numbers": (lambda f: reseal(f, lambda m: m.update(files={"config.json": 7})), "size and SHA-256"),
    "a file outside": (
        lambda f: reseal(f, lambda m: m["files"].update({"../../x": m["files"]["config.json"]})),
        "missing files: .'../../x'",
    ),
    "a file too many": (lambda f: (f / "trainer" / "extra.bin").write_bytes(b"x"), "do not belong: .'trainer/extra"),
    "a file too few": (lambda f: (f / "trainer" / "state.json").unlink(), "missing files: .'trainer/state.json'"),
    "a link to a file": (lambda f: move_out(f, "model.safetensors"), "model.safetensors is a link"),
    "a link to a folder": (lambda f: move_out(f, "trainer"), "trainer is a link"),
    "a link in its own place": (replace_by_link, "is a link"),
    "a pipe": (replace_by_pipe, "model.safetensors has 0 bytes"),
}


def _edit(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps({**content, key: value}), encoding="utf-8")


@pytest.mark.fault(row=8)
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_step_whose_manifest_does_not_hold_is_passed_over_by_name(
    run: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = newest(run)
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)
    told: list[str] = []
    assert latest_checkpoint(run, told.append) == folder.with_name("step-00000006")
    assert len(told) == 1 and "step-00000008" in told[0]


@pytest.mark.fault(row=8)
def test_links_and_files_among_the_checkpoints_do_not_stop_a_run(run: Path, made: Path) -> None:
    root, outside = run / "checkpoints", run.parent / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine", encoding="utf-8")
    replace_by_link(newest(run))
    (root / "step-00000003.tmp").symlink_to(outside)
    (root / "step-00000005.tmp").write_text("a file", encoding="utf-8")
    (root / "step-00000007").write_text("a file", encoding="utf-8")
    train(tiny_config(run.parent, training__save_total_limit=2, **same_text(made)))
    assert (outside / "mine.txt").read_text(encoding="utf-8") == "mine"
    assert (run / "elsewhere" / "model.safetensors").exists()
    assert verify(newest(run))["step"] == 8 and not list(root.glob("*.tmp"))
    found, whole = state_hashes(run), state_hashes(made / "run")
    assert {name: value for name, value in whole.items() if "00008" in name}.items() <= found.items()
