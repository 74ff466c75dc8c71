"""A run of several processes, each a forked child that knows its rank as torchrun would have told it."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusiontree import HybridLanguageModel
from tests.faults.process import Child, Prepare


@contextmanager
def started(config: Path, folder: Path, prepares: Sequence[Prepare | None]) -> Iterator[list[Child]]:
    """`fusiontree train` in one process per entry of `prepares`; output in out-0.txt, out-1.txt …"""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(prepares))}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Child(["train", config], folder / f"out-{rank}.txt", partial(become, address, rank, prepare))
            )
            for rank, prepare in enumerate(prepares)
        ]


def become(address: dict[str, str], rank: int, prepare: Prepare | None) -> None:
    """Take on a rank."""
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def signal_in_step(step: int, number: int) -> None:
    """Get a signal in the forward pass of a step, of which there is one per step."""
    calls, original = [0], HybridLanguageModel.forward

    def forward(self: HybridLanguageModel, *arguments: Any, **options: Any) -> Any:
        calls[0] += self.training
        if calls[0] == step and self.training:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    HybridLanguageModel.forward = forward  # type: ignore[method-assign]


def die_in_step(step: int) -> None:
    signal_in_step(step, signal.SIGKILL)


def freeze_in_step(step: int) -> None:
    signal_in_step(step, signal.SIGSTOP)


def log_weights(path: Path, then: Prepare | None = None) -> None:
    """Write a hash of all weights at the begin of every step."""
    original = HybridLanguageModel.forward

    def forward(self: HybridLanguageModel, *arguments: Any, **options: Any) -> Any:
        if self.training:
            digest = hashlib.sha256()
            for parameter in self.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            with path.open("a", encoding="utf-8") as file:
                file.write(digest.hexdigest() + "\n")
        return original(self, *arguments, **options)

    HybridLanguageModel.forward = forward  # type: ignore[method-assign]
    if then is not None:
        then()
