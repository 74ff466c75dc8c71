"""Every test runs offline, seeded and on one thread, so that two workers share two cores and numbers repeat."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

pytest_plugins = ["tests.faults.report"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
