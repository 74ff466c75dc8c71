"""The composite loss: every term real, counted once, and never a wait for the device."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree import HybridConfig, HybridLanguageModel
from fusiontree.train.config import LossSection
from fusiontree.train.losses import HybridModelLoss, Share, distillation, gate_decidedness, phase_at, target_mask


def settings(**values: float) -> LossSection:
    return LossSection.model_validate(values)


def output(gates: list[Tensor | None], loss: float = 2.0) -> Any:
    return SimpleNamespace(loss=torch.tensor(loss, requires_grad=True), gates=tuple(gates), logits=None)


def tiny_model() -> HybridLanguageModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "mamba_head_dim": 16, "mamba_d_state": 8, "gate_rank": 4}
    return HybridLanguageModel(HybridConfig(vocab_size=40, num_hidden_layers=2, sliding_window=8, **sizes))


def batch(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    ids = torch.arange(rows * length).reshape(rows, length) % 40
    return {"input_ids": ids, "labels": ids.clone()}


def test_the_balance_hinge_costs_nothing_inside_its_margin() -> None:
    gates = [torch.full((1, 4, 3), value, requires_grad=True) for value in (0.45, 0.58)]
    terms = HybridModelLoss(settings(balance_weight=1.0), False)(
        output([gates[0], None, gates[1]]), batch(1, 4), "balance"
    )
    assert terms["balance_loss"].item() == 0
    assert terms["loss"].item() == 2.0


def test_the_balance_hinge_is_the_mean_distance_outside_the_margin() -> None:
    low, high = torch.full((1, 4, 3), 0.2, requires_grad=True), torch.full((1, 4, 3), 0.7, requires_grad=True)
    terms = HybridModelLoss(settings(balance_weight=0.5), False)(output([low, high]), batch(1, 4), "balance")
    assert terms["balance_loss"].item() == pytest.approx((0.2 + 0.1) / 2)
    assert terms["loss"].item() == pytest.approx(2.0 + 0.5 * 0.15)
    assert terms["gate_mean"].item() == pytest.approx(0.45)
    terms["loss"].backward()
    assert (low.grad < 0).all() and (high.grad > 0).all()  # type: ignore[operator]


def test_padding_does_not_count() -> None:
    gate = torch.tensor([[[0.9], [0.9], [0.1], [0.1]]])
    mask = torch.tensor([[0, 0, 1, 1]])
    terms = HybridModelLoss(settings(), False)(output([gate]), {**batch(1, 4), "attention_mask": mask}, "balance")
    assert terms["gate_mean"].item() == pytest.approx(0.1)


def test_entropy_is_measured_from_undecided_to_decided() -> None:
    assert gate_decidedness([torch.full((1, 2, 2), 0.5)]).item() == pytest.approx(0, abs=1e-6)
    assert gate_decidedness([torch.tensor([[[0.0, 1.0]]])]).item() == pytest.approx(1, abs=1e-3)
    expected = 1 + (0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(2)
    assert gate_decidedness([torch.full((1, 2, 2), 0.8)]).item() == pytest.approx(expected, abs=1e-5)


def test_entropy_pulls_together_while_balancing_and_apart_while_specialising() -> None:
    loss = HybridModelLoss(settings(balance_weight=0, entropy_weight=1.0, sharpen_weight=1.0), False)
    gradients = {}
    for phase in ("balance", "specialise"):
        gate = torch.full((1, 2, 2), 0.7, requires_grad=True)
        loss(output([gate]), batch(1, 2), phase)["loss"].backward()  # type: ignore[arg-type]
        gradients[phase] = gate.grad
    assert (gradients["balance"] > 0).all() and (gradients["specialise"] < 0).all()


def test_phases_follow_the_fraction_of_steps() -> None:
    half = settings(specialise_after=0.5)
    assert [phase_at(step, 4, half) for step in range(4)] == ["balance", "balance", "specialise", "specialise"]
    assert phase_at(99, 100, settings(specialise_after=1.0)) == "balance"
    loss = HybridModelLoss(settings(), False)
    assert loss.needs_gates("balance") and not loss.needs_gates("specialise")


@pytest.mark.parametrize("weights", [{"balance_weight": 5.0, "balance_target": 0.9}, {"entropy_weight": 5.0}])
def test_gate_terms_reach_the_gate_parameters(weights: dict[str, float]) -> None:
    model, data = tiny_model(), batch()
    out = model(**data, output_gates=True)
    plain = HybridModelLoss(settings(balance_weight=0.0), False)(out, data, "balance")["loss"]
    full = HybridModelLoss(settings(**weights), False)(out, data, "balance")["loss"]
    names = [name for name, _ in model.named_parameters() if ".gate." in name]
    parameters = [dict(model.named_parameters())[name] for name in names]
    before = torch.autograd.grad(plain, parameters, retain_graph=True)
    after = torch.autograd.grad(full, parameters)
    moved = [name for name, a, b in zip(names, before, after, strict=True) if not torch.equal(a, b)]
    assert any("layers.0" in name for name in moved) and any("layers.1" in name for name in moved)


def test_the_total_is_the_model_loss_plus_each_term_once() -> None:
    model, data = tiny_model(), batch()
    out = model(**data, output_gates=True)
    teacher = torch.randn(2, 12, 40)
    chosen = settings(balance_weight=0.3, balance_target=0.9, entropy_weight=0.2, distill_weight=0.5)
    terms = HybridModelLoss(chosen, distill=True)(out, data, "balance", teacher)
    total = out.loss + 0.3 * terms["balance_loss"] + 0.2 * terms["entropy_loss"] + 0.5 * terms["distill_loss"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())
    assert terms["lm_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_is_averaged_by_tokens() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    p, q = F.softmax(teacher / 3, -1), F.softmax(student / 3, -1)
    per_token = (p * (p.log() - q.log())).sum(-1)[:, :-1]
    expected = 9 * per_token[mask].mean()
    assert distillation(student, teacher, mask, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation(student, student, mask, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_distillation_of_unequal_padded_batches_by_hand() -> None:
    """At temperature 2 a teacher with logits (2 ln 3, 0) says 3/4 and 1/4; the student says 1/2 and 1/2.

    KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812 a token, times 2² = 0.523248. Three of the four targets in both batches
    have such a teacher, one has the student itself; what the teacher says at padding must not count.
    """
    agrees, differs, padding = [0.0, 0.0], [2 * math.log(3), 0.0], [50.0, -50.0]
    loss = HybridModelLoss(settings(distill_weight=1.0, balance_weight=0.0), distill=True)
    total = 0.0
    for teacher, mask in (
        ([[differs, differs, agrees, padding, padding]], [[1, 1, 1, 1, 0]]),  # 3 targets; the last token predicts none
        ([[differs, padding, padding], [padding, padding, padding]], [[1, 1, 0], [1, 0, 0]]),  # 1 target
    ):
        attention = torch.tensor(mask)
        labels = torch.where(attention == 1, 1, -100)
        data = {"input_ids": attention, "labels": labels, "attention_mask": attention}
        share = Share(targets=int(target_mask(data).sum()) / 4)
        out = SimpleNamespace(loss=torch.tensor(0.0), logits=torch.zeros(*attention.shape, 2))
        total += loss(out, data, "balance", torch.tensor(teacher), share)["distill_loss"].item()
    assert total == pytest.approx(3 / 4 * 0.523248, rel=1e-5)


def test_targets_stop_at_document_boundaries() -> None:
    labels = torch.tensor([[-100, 5, 6, 7, 8, -100]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert target_mask({"labels": labels, "position_ids": positions}).tolist() == [[True, True, False, True, False]]
    assert target_mask({"labels": labels}).tolist() == [[True, True, True, True, False]]


def test_the_loss_never_waits_for_the_device() -> None:
    """A meta tensor has no values: anything that reads one (`.item()`, indexing by a mask) raises."""
    gates = [torch.rand(2, 6, 4, device="meta", requires_grad=True) for _ in range(3)]
    out = SimpleNamespace(
        loss=torch.zeros((), device="meta"), gates=tuple(gates), logits=torch.rand(2, 6, 9, device="meta")
    )
    labels = torch.zeros(2, 6, dtype=torch.long, device="meta")
    data = {"labels": labels, "attention_mask": labels, "position_ids": labels}
    chosen = settings(entropy_weight=1.0, distill_weight=1.0)
    terms = HybridModelLoss(chosen, distill=True)(out, data, "balance", torch.rand(2, 6, 9, device="meta"))
    assert terms["loss"].device.type == "meta" and len(terms) == 6
