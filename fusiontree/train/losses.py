"""HybridModelLoss: cross entropy, gate balance, gate entropy and distillation, each reported, each counted once.

B batch, L tokens, H channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.train.config import LossSection

Phase = Literal["balance", "specialise"]


def target_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, L-1) bool: positions t whose prediction of token t+1 counts (a target, in the same document)."""
    mask: Tensor = batch["labels"][:, 1:] != -100
    positions = batch.get("position_ids")
    return mask if positions is None else mask & (positions[:, 1:] != 0)


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens that are not padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


@dataclass(frozen=True)
class Share:
    """What part of a step a micro-batch is: of its targets, which the loss is averaged over, and of its tokens, which
    the gates are. The terms of all micro-batches, each times its share, add up to the step's."""

    targets: float = 1.0
    tokens: float = 1.0


def phase_at(step: int, steps: int, settings: LossSection) -> Phase:
    """Balance first, so that both branches learn; specialise later, so that gates may decide."""
    return "balance" if step < settings.specialise_after * steps else "specialise"


class HybridModelLoss:
    """Adds up the terms of the training loss from one forward pass; see LossSection for the weights."""

    def __init__(self, settings: LossSection, distill: bool) -> None:
        self.settings = settings
        self.distill = distill and settings.distill_weight > 0

    def weights(self, phase: Phase) -> tuple[float, float]:
        """(balance, entropy) weights of a phase; a negative entropy weight sharpens."""
        if phase == "balance":
            return self.settings.balance_weight, self.settings.entropy_weight
        return 0.0, -self.settings.sharpen_weight

    def needs_gates(self, phase: Phase) -> bool:
        """Whether the loss of this phase depends on the gates."""
        return any(self.weights(phase))

    def __call__(
        self, out: Any, batch: Mapping[str, Any], phase: Phase, teacher_logits: Tensor | None = None,
        share: Share = Share(),
    ) -> dict[str, Tensor]:  # fmt: skip
        """Scalars: `loss` with gradient, and detached: lm_loss, gate_mean, balance_loss, entropy_loss,
        router_loss, router_load, distill_loss.

        out: the model's, with `loss`, `logits`, and `gates` where wanted; terms that cannot be had are left out. Each
        is multiplied by the micro-batch's `share` of the step.
        """
        terms: dict[str, Tensor] = {"lm_loss": out.loss * share.targets}
        total = terms["lm_loss"]
        gates = [gate for gate in (getattr(out, "gates", None) or ()) if gate is not None]
        if gates:
            balance_weight, entropy_weight = self.weights(phase)
            mask = batch.get("attention_mask")
            terms["gate_mean"], terms["balance_loss"] = (term * share.tokens for term in self._balance(gates, mask))
            with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_weight != 0):
                terms["entropy_loss"] = gate_decidedness(gates, mask) * share.tokens
            total = total + balance_weight * terms["balance_loss"] + entropy_weight * terms["entropy_loss"]
        routing = [sent for sent in (getattr(out, "routing", None) or ()) if sent is not None]
        if routing:
            balance = router_balance(routing, batch.get("attention_mask"))
            terms["router_loss"], terms["router_load"] = (term * share.tokens for term in balance)
            total = total + self.settings.router_weight * terms["router_loss"]
        if self.distill and teacher_logits is not None:
            kl = distillation(out.logits, teacher_logits, target_mask(batch), self.settings.distill_temperature)
            terms["distill_loss"] = kl * share.targets
            total = total + self.settings.distill_weight * terms["distill_loss"]
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}

    def _balance(self, gates: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mean gate, mean over layers of how far each layer's mean gate is outside target +- margin)."""
        means = torch.stack([_token_mean(gate.float(), mask) for gate in gates])
        outside = (means - self.settings.balance_target).abs() - self.settings.balance_margin
        return means.mean(), outside.clamp(min=0).mean()


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens and channels of (B, L, H); mask (B, L) is 1 on real tokens."""
    if mask is None:
        return values.mean()
    real = mask.to(values.dtype)
    return (values.mean(-1) * real).sum() / real.sum().clamp(min=1)


def router_balance(routing: list[Any], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(balance loss, load), means over layers: E Σ share_e · probability_e (Fedus et al. 2021), which is 1 when tokens
    are spread evenly; and the busiest expert's share times E, without gradient, 1 to E."""
    losses, loads = [], []
    for probabilities, chosen in routing:
        experts = probabilities.shape[-1]
        sent = F.one_hot(chosen, experts).sum(-2).float() / chosen.shape[-1]  # (B, L, E)
        real = torch.ones(sent.shape[:2], device=sent.device) if mask is None else mask.float()
        share, likely = ((t * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1) for t in (sent, probabilities))
        losses.append(experts * (share * likely).sum())
        loads.append(experts * share.max())
    return torch.stack(losses).mean(), torch.stack(loads).mean()


def gate_decidedness(gates: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """1 - binary entropy / ln 2, averaged over layers: 0 when every gate is 0.5, 1 when every gate is at an end."""
    terms = []
    for gate in gates:
        p = gate.float().clamp(1e-6, 1 - 1e-6)
        entropy = -(p * p.log() + (1 - p) * torch.log1p(-p))
        terms.append(1 - _token_mean(entropy, mask) / math.log(2))
    return torch.stack(terms).mean()


def distillation(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, averaged over the tokens in `mask` (B, L-1); logits (B, L, V)."""
    # Weighted instead of indexed by the mask: indexing would wait for the device to count the tokens.
    chosen = F.log_softmax(student[:, :-1].float() / temperature, -1)
    wanted = F.log_softmax(teacher[:, :-1].float() / temperature, -1)
    per_token = F.kl_div(chosen, wanted, log_target=True, reduction="none").sum(-1)
    return (per_token * mask).sum() / mask.sum().clamp(min=1) * temperature**2
