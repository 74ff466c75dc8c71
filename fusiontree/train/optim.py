"""Optimizers, their parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from fusiontree.train.config import TrainingSection


class Optimizers:
    """One or two torch optimizers used as one, with state addressed by parameter name."""

    def __init__(self, members: Iterable[torch.optim.Optimizer], names: dict[nn.Parameter, str]) -> None:
        self.members = list(members)
        self._names = names

    @property
    def groups(self) -> list[dict]:
        """Parameter groups of all members."""
        return [group for member in self.members for group in member.param_groups]

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step, the same in every group."""
        for group in self.groups:
            group["lr"] = lr

    def step(self) -> None:
        """Update the weights from their gradients."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """State as `parameter name/state name` -> tensor."""
        tensors = {}
        for member in self.members:
            for group in member.param_groups:
                for parameter in group["params"]:
                    for key, value in member.state.get(parameter, {}).items():
                        tensors[f"{self._names[parameter]}/{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; torch puts each tensor on its parameter's device."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            by_name.setdefault(parameter, {})[key] = tensor
        for member in self.members:
            content = member.state_dict()
            parameters = [parameter for group in member.param_groups for parameter in group["params"]]
            named = ((index, self._names[parameter]) for index, parameter in enumerate(parameters))
            content["state"] = {index: by_name[name] for index, name in named if name in by_name}
            member.load_state_dict(content)


def uses_muon(name: str, parameter: nn.Parameter) -> bool:
    """Muon is for hidden matrices: not embeddings, output head, state-space parameters, norms, biases, conv filters."""
    outer = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    return parameter.ndim == 2 and not _undecayed(parameter) and not outer


def _undecayed(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_no_weight_decay", False)) or parameter.ndim < 2


def build_optimizers(model: nn.Module, settings: TrainingSection) -> Optimizers:
    """AdamW over everything, or Muon on hidden matrices beside AdamW on the rest; decay only where it belongs."""
    named = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    muon = [p for p, name in named.items() if settings.optimizer == "muon" and uses_muon(name, p)]
    rest = [p for p in named if p not in set(muon)]
    groups = [
        {"params": [p for p in rest if not _undecayed(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if _undecayed(p)], "weight_decay": 0.0},
    ]
    members: list[torch.optim.Optimizer] = [
        AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=all(p.device.type in ("cpu", "cuda") for p in rest),
        )
    ]
    if muon:
        # match_rms_adamw: updates as large as AdamW's, so that one rate serves both (Moonlight, arXiv 2502.16982).
        members.append(
            Muon(
                muon,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return Optimizers(members, named)


def learning_rate(step: int, settings: TrainingSection) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then down to lr * min_lr_ratio at the last step."""
    peak, floor = settings.lr, settings.lr * settings.min_lr_ratio
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    start = settings.warmup_steps
    if settings.schedule == "wsd":
        start = max(start, round(settings.steps * (1 - settings.decay_fraction)))
    progress = min(max((step - start) / max(settings.steps - 1 - start, 1), 0.0), 1.0)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress
