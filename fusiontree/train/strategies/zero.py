"""DeepSpeed's ZeRO: optimizer state, gradients (stage 2) and weights (stage 3) are divided among the processes.

The weights stay in fp32 and the compute under autocast, as with the other engines, so that losses are comparable and
state-space parameters keep their precision. DeepSpeed's own checkpoints, which hold pickles, are not used.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from fusiontree.errors import ConfigError
from fusiontree.train.config import TrainingSection
from fusiontree.train.optim import build_optimizers
from fusiontree.train.ranks import Ranks
from fusiontree.train.strategies.single import SingleProcess

# Said by the run's own settings; what stands in both would sooner or later differ.
OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "steps_per_print",
    "managed_gradient_accumulation", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq")


def read_deepspeed(path: str, settings: TrainingSection) -> dict[str, Any]:
    """DeepSpeed's settings from a JSON file, with the run's own filled in; raises ConfigError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"system.deepspeed: {path}: cannot be read as JSON: {error}") from error
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"system.deepspeed: {path}: zero_optimization.stage: must be 1, 2 or 3")
    doubled = sorted(set(content) & set(OURS))
    if doubled:
        raise ConfigError(f"system.deepspeed: {path}: {doubled[0]}: is said by the run's own settings; leave it out")
    if settings.optimizer != "adamw":
        raise ConfigError(f"training.optimizer: {settings.optimizer} needs system.engine single, ddp or fsdp")
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(settings.precision, "bfloat16")
    return {
        **content,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "torch_autocast": {
            "enabled": settings.precision != "fp32",
            "dtype": dtype,
            "lower_precision_safe_modules": [],  # weights and gradients travel in fp32
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class DeepSpeedZero(SingleProcess):
    """A DeepSpeed engine that is told by us when a step ends."""

    def __init__(self, ranks: Ranks, content: dict[str, Any]) -> None:
        super().__init__(ranks)
        self.content = content
        self.divides_weights = content["zero_optimization"]["stage"] == 3
        self.engine: Any = None

    def _adopt(self, model: nn.Module, settings: TrainingSection) -> None:
        """Hand model and optimizer to DeepSpeed, and give the optimizer its state at once."""
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            advice = 'pip install "fusiontree[deepspeed]"'
            raise ConfigError(f"system.engine: deepspeed is not installed ({error}); {advice}") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.model, self.optimizers = model, build_optimizers(model, settings)
        try:
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizers.members[0], config=self.content, dist_init_required=False
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"system.deepspeed: {where}: {first['msg']}") from error
        self.forward = self.engine
        self._fill_state(0.0)

    def backward(self, loss: Tensor, scale: float) -> None:
        """Shares of the loss add up, where DeepSpeed would average."""
        if scale != 1.0:
            self.engine.optimizer.override_loss_scale(scale)
        self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def update(self, max_norm: float, scale: float) -> tuple[float, bool]:
        """DeepSpeed clips, and leaves the weights alone when the norm is not finite."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), not self.engine.optimizer.overflow

    def accumulating(self, last: bool) -> Any:
        """Gradients are divided after each micro-batch; the last one ends the step."""
        self.engine.set_gradient_accumulation_boundary(last)
        return super().accumulating(last)

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight with the parts of all processes."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor).detach() if self.divides_weights else tensor.detach()

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """As a single process names it; DeepSpeed counts steps once for many weights."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self.optimizers.members[0].state
        for name, parameter in self.model.named_parameters():
            yield f"{name}/step", state[self._flat()[0]]["step"].clone()
            for key in MOMENTS:
                yield f"{name}/{key}", safe_get_full_optimizer_state(parameter, key)

    def load_optimizer_state(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        """Each process keeps its part of what it reads; the count of steps is the largest of all weights'."""
        parameters, steps = dict(self.model.named_parameters()), 0.0
        for name in names:
            parameter, _, key = name.rpartition("/")
            value = read(name)
            if key == "step":
                steps = max(steps, float(value))
            else:
                self._set_state(parameters[parameter], key, value.to(self.device))
        for flat in self._flat():
            self.optimizers.members[0].state[flat]["step"].fill_(steps)

    def _set_state(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self.divides_weights:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Every process has as much of a weight; what the last one has too much is padding.
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, size * self.ranks.rank, size), key)

    def _flat(self) -> list[Tensor]:
        """DeepSpeed's own fp32 tensors, each a part of many weights, over which the optimizer works."""
        optimizer = self.engine.optimizer
        flat: list[Tensor]
        flat = (
            optimizer.fp32_partitioned_groups_flat
            if self.divides_weights
            else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _fill_state(self, steps: float) -> None:
        """What AdamW would make at its first step; DeepSpeed cannot be asked for state that is not there yet."""
        state = self.optimizers.members[0].state
        for flat in self._flat():
            moments = {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
            state[flat] = {"step": torch.full((), steps, device=flat.device), **moments}
        if not self.divides_weights:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
