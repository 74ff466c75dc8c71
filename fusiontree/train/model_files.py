"""Model and optimizer to and from a checkpoint's files, the same whichever engine trains them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.train.ranks import Ranks
from fusiontree.train.strategies import SingleProcess
from fusiontree.train.tensors import TensorFiles, write_tensors

MODEL, OPTIMIZER, TRAINER = "model", "optimizer", "trainer"


class StateStream:
    """All weights and optimizer state of this moment; the processes gather them together, the first one writes."""

    def __init__(self, strategy: SingleProcess) -> None:
        self.model = strategy.model
        self.weights: Iterator[tuple[str, Tensor]] = iter(strategy.weights())
        self.optimizer: Iterator[tuple[str, Tensor]] = iter(strategy.optimizer_state())

    def write(self, folder: Path) -> None:
        """A folder for from_pretrained, with the optimizer's state in `trainer/`."""
        write_tensors(folder, MODEL, self.weights)
        config, kind = self.model.config, type(self.model).__name__
        config.architectures = [kind.removeprefix("FSDP")]  # which fully_shard puts before the name of the class
        config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        write_tensors(folder / TRAINER, OPTIMIZER, self.optimizer)

    def drain(self) -> None:
        """Gather what is left without keeping it: others may be waiting for this process's parts."""
        _exhaust(self.weights)
        _exhaust(self.optimizer)


def _exhaust(items: Iterable[Any]) -> None:
    deque(items, maxlen=0)


@torch.no_grad()
def load_weights(model: Any, folder: Path | None, ranks: Ranks) -> None:
    """The weights in `folder`, if any, into the model of every process; without one, the first process's to all."""
    files = TensorFiles(folder, MODEL) if folder is not None and ranks.first else None
    for name, parameter in model.named_parameters():
        if files is not None:
            parameter.copy_(files.read(name))
        ranks.share(parameter.data)


def load_optimizer(strategy: SingleProcess, folder: Path) -> None:
    """The optimizer's state in `folder` into the engine; the first process reads, all take part."""
    ranks = strategy.ranks
    files = TensorFiles(folder / TRAINER, OPTIMIZER) if ranks.first else None
    shapes = ranks.share_object(files.shapes() if files is not None else {})
    strategy.load_optimizer_state(list(shapes), _shared(files, shapes, ranks))


def _shared(
    files: TensorFiles | None, shapes: dict[str, tuple[list[int], torch.dtype]], ranks: Ranks
) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        if files is not None:
            return ranks.share(files.read(name))
        shape, dtype = shapes[name]
        return ranks.share(torch.empty(shape, dtype=dtype))

    return read
