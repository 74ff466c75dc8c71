"""How a step is carried out by one process or many: four thin adapters with one face, chosen here."""

from __future__ import annotations

from fusiontree.errors import ConfigError
from fusiontree.train.config import RunConfig
from fusiontree.train.ranks import Ranks, join, processes_started
from fusiontree.train.strategies.single import SingleProcess

__all__ = ["SingleProcess", "build_strategy"]


def build_strategy(config: RunConfig, device: object) -> SingleProcess:
    """The engine that `system.engine` names, joined with the other processes of the run.

    Raises ConfigError when it does not fit how the processes were started, or its package is missing.
    """
    import torch

    assert isinstance(device, torch.device)
    system, started = config.system, processes_started()
    name = system.engine if system.engine != "auto" else ("ddp" if started > 1 else "single")
    if name == "single":
        if started > 1:
            raise ConfigError(f"system.engine: single is one process, but {started} were started; use ddp or fsdp")
        return SingleProcess(Ranks(device))
    if name == "ddp":
        from fusiontree.train.strategies.ddp import DataParallel

        return DataParallel(join(device, system.timeout))
    if name == "fsdp":
        from fusiontree.train.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(join(device, system.timeout), system.offload)
    from fusiontree.train.strategies.zero import DeepSpeedZero, read_deepspeed

    assert system.deepspeed is not None
    return DeepSpeedZero(join(device, system.timeout), read_deepspeed(system.deepspeed, config.training))
