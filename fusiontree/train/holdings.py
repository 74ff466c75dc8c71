"""What one process holds of a model's weights, gradients and optimizer state under each engine, in bytes.

All engines keep weights in fp32 and compute under autocast. P parameters, N processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.models import HybridConfig, account
from fusiontree.models.accounting import projections
from fusiontree.train.config import RunConfig
from fusiontree.train.strategies.zero import read_deepspeed

_F32 = 4
# What DeepSpeed takes where the file is silent: elements, and whether exchanges run beside the compute.
_BUCKET, _PREFETCH, _LIVE = 500_000_000, 50_000_000, 1_000_000_000


@dataclass(frozen=True)
class Holdings:
    """Bytes on the device, but for `host`."""

    weights: int
    optimizer: int
    gradients: int
    """When a step's last backward is over."""
    kept_part: float = 1.0
    """Part of a gradient that stays on this device once it is summed."""
    standing: int = 0
    """Room for gradients that is never given back."""
    accumulated: int = 0
    """Gradients of earlier micro-batches, room included."""
    gathered: int = 0
    """Weights of other processes, or of the host, that are here while they are at work."""
    exchange: int = 0
    """Gradients on their way to other processes, in the backward."""
    update: int = 0
    """Passing tensors of the update."""
    divided_by: int = 1
    """Processes among which the weights are divided."""
    host: dict[str, int] = field(default_factory=dict)


def holdings(config: RunConfig, model: HybridConfig, processes: int, device: str) -> Holdings:
    """By `system.engine`; raises ConfigError when DeepSpeed's file cannot be read, or the engine is for one process."""
    engine = config.system.engine
    if engine == "auto":
        engine = "ddp" if processes > 1 else "single"
    if engine == "single" and processes > 1:
        raise ConfigError(f"system.engine: single is one process, not {processes}; use ddp or fsdp")
    kinds: dict[str, Callable[[RunConfig, HybridConfig, int, str], Holdings]] = {
        "single": _single, "ddp": _ddp, "fsdp": _fsdp, "deepspeed": _deepspeed,
    }  # fmt: skip
    return kinds[engine](config, model, processes, device)


def _single(config: RunConfig, model: HybridConfig, processes: int, device: str) -> Holdings:
    size = _F32 * account(model).total_parameters
    return Holdings(size, _optimizer(config, model), size, accumulated=size, update=_muon_update(config, model))


def _optimizer(config: RunConfig, model: HybridConfig) -> int:
    """AdamW has two moments; Muon, which takes the layers' matrices, one."""
    counted = account(model)
    muon = _matrices(model) if config.training.optimizer == "muon" else 0
    return _F32 * (2 * counted.total_parameters - muon)


def _matrices(model: HybridConfig) -> int:
    """Weights of the layers' matrix products."""
    return sum(sum(projections(model, spec).values()) for spec in model.layer_specs)


def _muon_update(config: RunConfig, model: HybridConfig) -> int:
    """Newton-Schulz holds about four bf16 copies of one matrix, and the update in fp32; the largest is the MLP's or a
    projection, a few times H x H."""
    return 12 * 5 * model.hidden_size**2 if config.training.optimizer == "muon" else 0


def _ddp(config: RunConfig, model: HybridConfig, processes: int, device: str) -> Holdings:
    """Whole everywhere. Gradients are views into buckets that stay; those of earlier micro-batches stand beside."""
    alone = _single(config, model, processes, device)
    return replace(alone, standing=alone.gradients, accumulated=2 * alone.gradients)


def _fsdp(config: RunConfig, model: HybridConfig, processes: int, device: str) -> Holdings:
    """Divided block by block: the block at work is whole, the next on its way; what is in no block stays whole.

    A GPU also holds the next block twice while it is copied out of the exchange, and the gradients of the block before
    until their sum has been formed beside the compute; on a CPU one follows the other.
    """
    total, largest, rest = _blocks(model)
    own = -(-total // processes)
    alone = _optimizer(config, model) // processes
    host = {"weights": own, "gradients": own, "optimizer": alone} if config.system.offload else {}
    beside = largest if device == "cuda" else 0
    kept = 0 if config.system.offload else 1
    return Holdings(
        weights=own * kept,
        optimizer=alone * kept,
        gradients=own * kept,
        kept_part=kept / processes,
        accumulated=own * kept,
        gathered=rest + 2 * largest + beside,
        exchange=largest + beside,
        update=2 * rest,
        divided_by=processes,
        host=host,
    )


def _blocks(model: HybridConfig) -> tuple[int, int, int]:
    """Bytes of all weights, of the largest block, and of what is in no block."""
    counted = account(model)
    blocks = [_F32 * sum(layer.parameters.values()) for layer in counted.per_layer]
    total = _F32 * counted.total_parameters
    return total, max(blocks), total - sum(blocks)


def _deepspeed(config: RunConfig, model: HybridConfig, processes: int, device: str) -> Holdings:
    """ZeRO as the file says; its optimizer works on a second fp32 copy of the process's part of the weights."""
    assert config.system.deepspeed is not None
    zero = read_deepspeed(config.system.deepspeed, config.training)["zero_optimization"]
    total = _F32 * account(model).total_parameters
    own = -(-total // processes)
    state = own + _optimizer(config, model) // processes
    bucket = _F32 * _elements(zero, "reduce_bucket_size", _BUCKET)  # taken whole, however small the model
    away = _offloads(zero, "offload_optimizer")
    shared = Holdings(
        weights=total,
        optimizer=0 if away else state,
        gradients=0 if away else own,
        kept_part=0.0 if away else 1 / processes,
        accumulated=0 if away else own,
        exchange=bucket * (2 if zero["stage"] < 3 and zero.get("overlap_comm") else 1),
        update=0 if away else own,
        host={"optimizer": state, "gradients": 2 * own} if away else {},
    )
    return _weights_divided(shared, zero, total, own, processes) if zero["stage"] == 3 else shared


def _weights_divided(held: Holdings, zero: dict[str, Any], total: int, own: int, processes: int) -> Holdings:
    """ZeRO-3: gathered weights are kept until there are too many, and some are fetched ahead."""
    live = _F32 * _elements(zero, "max_live_parameters", _LIVE)
    ahead = _F32 * _elements(zero, "prefetch_bucket_size", _PREFETCH)
    away = _offloads(zero, "offload_param")
    return replace(
        held,
        weights=0 if away else own,
        gathered=min(total, live + ahead),
        standing=held.gradients,
        divided_by=processes,
        host={**held.host, **({"weights": own} if away else {})},
    )


def _elements(zero: dict[str, Any], name: str, default: int) -> int:
    """A size in DeepSpeed's settings, with or without the prefix that some of them may have."""
    return int(zero.get(name, zero.get(f"stage3_{name}", default)))


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"
