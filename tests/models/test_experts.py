"""A mixture of experts: the sum it is, its router's balance, what it costs."""

import pytest
import torch
from torch import Tensor

from fusiontree.models import HybridLanguageModel, account
from fusiontree.models.experts import MixtureOfExperts
from fusiontree.train.config import LossSection
from fusiontree.train.losses import HybridModelLoss, router_balance
from tests.models.kinds import assert_same, build, config_of, tokens


def by_hand(experts: MixtureOfExperts, x: Tensor) -> Tensor:
    rows = []
    for token in x.flatten(0, 1):
        likely = torch.softmax(experts.router(token), -1)
        best = likely.argsort(descending=True)[: experts.per_token]
        weights = likely[best] / likely[best].sum() if len(best) > 1 else likely[best]
        rows.append(sum(w * experts.experts[e](token[None])[0] for w, e in zip(weights, best.tolist(), strict=True)))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("per_token", [1, 2, 4])
@pytest.mark.parametrize("mlp_type", ["mlp", "swiglu"])
def test_each_token_gets_the_sum_over_its_experts(per_token: int, mlp_type: str) -> None:
    experts = build("experts", experts_per_token=per_token, mlp_type=mlp_type).model.layers[0].mlp
    x = torch.randn(2, 13, 32)
    y, (probabilities, chosen) = experts(x)
    assert_same(y, by_hand(experts, x))
    weights, _ = probabilities.topk(per_token)
    weights = weights / weights.sum(-1, keepdim=True) if per_token > 1 else weights
    assert_same(experts._everywhere(x, weights, chosen), y)  # as a compiler runs it
    assert_same(probabilities.sum(-1), torch.ones(2, 13))
    assert chosen.shape == (2, 13, per_token)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    model = build("experts", experts_per_token=1)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.router.weight.zero_()  # all alike: one of them is taken, the same for every token
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    grads = [expert.down_proj.weight.grad for expert in model.model.layers[0].mlp.experts]
    assert all(g is not None for g in grads) and sorted(bool(g.any()) for g in grads) == [False] * 3 + [True]


def test_balance_is_one_when_even_and_more_when_not() -> None:
    even = torch.full((1, 4, 4), 0.25), torch.arange(4).view(1, 4, 1)
    loss, load = router_balance([even], None)
    assert loss.item() == pytest.approx(1) and load.item() == pytest.approx(1)
    one = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 4, 4), torch.zeros(1, 4, 1, dtype=torch.long)
    loss, load = router_balance([one], None)
    assert loss.item() == pytest.approx(2.8) and load.item() == pytest.approx(4)
    mixed = torch.cat([even[0], one[0]], 1), torch.cat([even[1], one[1]], 1)
    loss, load = router_balance([mixed], torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]))  # padding has no say
    assert loss.item() == pytest.approx(1) and load.item() == pytest.approx(1)


def test_the_balance_loss_is_added_once_and_reaches_the_routers() -> None:
    model, ids = build("experts").train(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    out = model(ids, attention_mask=mask, labels=ids)
    data = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    terms = HybridModelLoss(LossSection(router_weight=0.5), distill=False)(out, data, "balance")
    assert terms["loss"].item() == pytest.approx(out.loss.item() + 0.5 * terms["router_loss"].item(), rel=1e-6)
    assert terms["router_loss"] >= 1 - 1e-3 and 1 <= terms["router_load"] <= 4
    plain = HybridModelLoss(LossSection(router_weight=0.0), distill=False)(out, data, "balance")["loss"]
    routers = [block.mlp.router.weight for block in model.model.layers]
    for a, b in zip(
        torch.autograd.grad(plain, routers, retain_graph=True), torch.autograd.grad(terms["loss"], routers), strict=True
    ):
        assert a.any() and not torch.equal(a, b)


def test_a_model_without_experts_says_nothing_of_them() -> None:
    out = build("post")(tokens(1, 9), labels=tokens(1, 9))
    terms = HybridModelLoss(LossSection(), False)(out, {"labels": tokens(1, 9), "input_ids": tokens(1, 9)}, "balance")
    assert out.routing is None and "router_loss" not in terms


def test_a_token_costs_its_own_experts_only() -> None:
    def flops(**settings: int) -> float:
        return account(config_of("experts", **settings)).flops["mlp"]

    router = 2 * 2 * 32 * 4
    assert flops(experts_per_token=4) - router == 2 * (flops(experts_per_token=2) - router)
    four = account(config_of("experts")).parameters["mlp"] - 2 * 32 * 4
    assert four == 4 * account(config_of("experts", num_experts=1, experts_per_token=1)).parameters["mlp"]


def test_experts_end_as_small_as_the_mlp_would() -> None:
    model = HybridLanguageModel(config_of("experts", hidden_size=64, num_hidden_layers=8))
    ends = [e.down_proj.weight.std().item() for block in model.model.layers for e in block.mlp.experts]
    assert all(std == pytest.approx(0.02 / 4, rel=0.1) for std in ends)
