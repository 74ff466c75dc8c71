"""The processes of a run: who they are, what they tell each other, and which of them is missing when one is lost."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree import errors
from fusiontree.errors import ConfigError, FusionTreeError, LostRankError

Result = TypeVar("Result")

ANSWER_SECONDS = 2.0  # how long the others have to say that they are alive after something went wrong


class Ranks:
    """One of `world_size` processes; alone, every exchange gives back what it got."""

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1, store: Any = None) -> None:
        self.device, self.rank, self.world_size = device, rank, world_size
        self._store = store
        self._rounds = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensor: Tensor) -> Tensor:
        """The first process's content of a tensor that all have in the same shape, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def share_object(self, value: Result) -> Result:
        """The first process's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in the first process; an error about the input is raised in all."""
        if self.world_size == 1:
            return work()
        outcome: tuple[Any, str, str] = (None, "", "")
        if self.first:
            try:
                outcome = (work(), "", "")
            except FusionTreeError as error:
                outcome = (None, type(error).__name__, str(error))
        value, kind, message = self.share_object(outcome)
        if kind:
            raise getattr(errors, kind)(message)
        return value

    def missing(self) -> list[int]:
        """Processes that do not answer; each that still can must call this too."""
        self._rounds += 1
        answer: list[list[int]] = []
        # In a thread: a store that hangs itself is waited for without an end.
        asking = threading.Thread(target=lambda: answer.append(self._silent()), daemon=True)
        asking.start()
        asking.join(2 * ANSWER_SECONDS + 0.1 * self.world_size)
        return answer[0] if answer else [0]  # the first process keeps the store, where torchrun does not

    def _silent(self) -> list[int]:
        keys = [f"fusiontree/alive/{self._rounds}/{rank}" for rank in range(self.world_size)]
        silent: list[int] = []
        try:
            self._store.set(keys[self.rank], "")
            for rank, key in enumerate(keys):
                try:
                    self._store.wait([key], timedelta(seconds=0.1 if silent else ANSWER_SECONDS))
                except dist.DistStoreError:
                    silent.append(rank)
        except dist.DistNetworkError:
            return [0]
        return silent

    def lost(self, error: RuntimeError, advice: str) -> LostRankError:
        """The error to raise when an exchange failed: it names the missing; of those left the first is to tell it."""
        if threading.current_thread() is threading.main_thread():
            # torchrun ends the others as soon as it misses one: not before they have said which.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if any(
            word in str(error).lower() for word in ("timed out", "timeout")
        ):  # where this process waited, and what its threads do
            traceback.print_exception(error)
            faulthandler.dump_traceback(sys.stderr)
        silent = self.missing()
        who = " and ".join(f"rank {rank}" for rank in silent) or "another process"
        told = self.rank != min(rank for rank in range(self.world_size) if rank not in silent)
        return LostRankError(f"{who} does not answer (killed, or hanging); {advice}", told=told)


def is_lost(error: RuntimeError) -> bool:
    """Whether an error came out of an exchange between processes; gloo's have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "pair closure" in str(error)


def processes_started() -> int:
    """How many processes torchrun, or another launcher that sets WORLD_SIZE, started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device, timeout: float) -> Ranks:
    """Meet the other processes that torchrun started; alone, make a group of one.

    `cuda` becomes this process's own GPU. Raises ConfigError when there are fewer GPUs than processes.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _meet(device, timedelta(seconds=timeout))
    return Ranks(device, dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store())


def _meet(device: torch.device, limit: timedelta) -> None:
    """One group for as long as this process lives: DeepSpeed keeps hold of it."""
    # Names that FSDP2 and DeepSpeed still use, told at every exchange.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    atexit.register(dist.destroy_process_group)
