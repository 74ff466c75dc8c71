"""Row 26: a step for which there is not enough memory ends the run with one line and the last checkpoint."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree import HybridLanguageModel
from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.train import train
from fusiontree.train.checkpoint import list_checkpoints, verify
from tests.faults.process import call
from tests.train.tiny import state_hashes, tiny_config, tiny_file

GIGABYTE = 1 << 30


def take_memory_away() -> None:
    """From the fourth step on, ask for a gigabyte that the process may not have."""
    calls, original = [0], HybridLanguageModel.forward

    def forward(self: HybridLanguageModel, *arguments: Any, **options: Any) -> Any:
        calls[0] += self.training
        if calls[0] == 7:
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
            limit = pages * resource.getpagesize() + GIGABYTE // 2
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            torch.zeros(GIGABYTE, dtype=torch.uint8)
        return original(self, *arguments, **options)

    HybridLanguageModel.forward = forward  # type: ignore[method-assign]


@pytest.mark.fault(row=26)
def test_a_step_that_does_not_fit_into_memory_costs_no_checkpoint(tmp_path: Path) -> None:
    changes = {"training__validation_every": None}
    code, output = call(["train", tiny_file(tmp_path, **changes)], tmp_path / "out.txt", take_memory_away)
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step 4: out of memory" in line and "step-00000002" in line and "training.micro_batch_size" in line
    assert "Traceback" not in output
    (folder,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert verify(folder)["step"] == 2
    assert train(tiny_config(tmp_path, **changes), evaluate=evaluate_loss).step == 8
    (tmp_path / "clean").mkdir()
    train(tiny_config(tmp_path / "clean", **changes), evaluate=evaluate_loss)
    assert state_hashes(tmp_path / "run") == state_hashes(tmp_path / "clean" / "run") != {}
