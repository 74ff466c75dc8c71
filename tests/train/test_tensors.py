"""Named tensors in one file or several, as Hugging Face names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree import HybridLanguageModel
from fusiontree.train import latest_checkpoint, train
from fusiontree.train.tensors import TensorFiles, write_tensors
from tests.train.tiny import lines, tiny_config

VALUES = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.randn(4, 4).t(), "d": torch.zeros(0)}


@pytest.mark.parametrize("file_bytes", [10**9, 60, 1])
def test_what_is_written_is_read(tmp_path: Path, file_bytes: int) -> None:
    write_tensors(tmp_path, "model", iter(VALUES.items()), file_bytes)
    files = TensorFiles(tmp_path, "model")
    assert {name: (list(value.shape), value.dtype) for name, value in VALUES.items()} == files.shapes()
    for name, value in VALUES.items():
        assert torch.equal(files.read(name), value)
    assert (len(list(tmp_path.iterdir())) == 1) == (file_bytes == 10**9)


def test_nothing_to_write_is_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path, "model", iter(()))
    assert TensorFiles(tmp_path, "model").shapes() == {}


def test_a_run_in_several_files_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: from_pretrained reads the folder."""
    one, several = tmp_path / "one", tmp_path / "several"
    constant = {"training__schedule": "constant", "training__loss": {"specialise_after": 1.0}}
    train(tiny_config(tmp_path, system__run_dir=str(one), **constant))
    monkeypatch.setattr(write_tensors, "__defaults__", (20_000,))
    train(tiny_config(tmp_path, system__run_dir=str(several), training__steps=4, **constant))
    folder = latest_checkpoint(several)
    assert folder is not None and len(list(folder.glob("model-0*-of-0*.safetensors"))) > 2
    written = dict(HybridLanguageModel.from_pretrained(folder).named_parameters())
    assert all(torch.equal(written[name], tensor) for name, tensor in saved(folder).items())
    train(tiny_config(tmp_path, system__run_dir=str(several), **constant))
    losses = [[line for line in lines(run) if "loss" in line] for run in (one, several)]
    assert losses[0] == losses[1]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    files = TensorFiles(folder, "model")
    return {name: files.read(name) for name in files.shapes()}
