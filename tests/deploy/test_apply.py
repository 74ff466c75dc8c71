"""The cut model equals the masked original, and what it lost is really gone."""

import itertools
from typing import Any

import pytest
import torch

from fusiontree.deploy.apply import apply_plan
from fusiontree.deploy.plan import LayerPlan, PrunePlan, identity_of, other_branch
from fusiontree.deploy.savings import branch_savings
from tests.deploy.tiny import tiny_model


def plan_removing(model: Any, removed: dict[int, str]) -> PrunePlan:
    layers = [LayerPlan(layer=layer, keep=other_branch(branch)) for layer, branch in removed.items()]
    return PrunePlan(model=identity_of(model), layers=layers)


def relative_error(model: Any, pruned: Any, removed: dict[int, str], ids: torch.Tensor) -> float:
    with torch.no_grad(), model.branches_removed(removed):
        wanted = model(ids, use_cache=False).logits
    with torch.no_grad():
        got = pruned(ids, use_cache=False).logits
    return float((got - wanted).abs().max() / wanted.abs().max())


REMOVALS: list[dict[int, str]] = [
    {}, {0: "mamba"}, {0: "attention"}, {2: "mamba"}, {0: "mamba", 1: "attention", 2: "mamba"},
    {0: "attention", 1: "attention", 2: "attention"}, {0: "mamba", 1: "mamba", 2: "mamba"},
]  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {}, {"tie_word_embeddings": False}, {"norm_placement": "pre", "srte": "learned"},
    {"norm_placement": "sandwich", "srte": "low_rank", "srte_shared": False, "num_key_value_heads": 4},
]  # fmt: skip


@pytest.mark.parametrize(("removed", "variant"), list(itertools.product(REMOVALS, VARIANTS)))
def test_the_cut_model_equals_the_masked_original(removed: dict[int, str], variant: dict[str, Any]) -> None:
    model = tiny_model(num_hidden_layers=3, **variant)
    pruned = apply_plan(model, plan_removing(model, removed))
    ids = torch.randint(0, 256, (2, 37))
    assert relative_error(model, pruned, removed, ids) < 1e-5
    if removed:
        with torch.no_grad():
            assert not torch.allclose(pruned(ids).logits, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("branch", ["mamba", "attention"])
def test_the_removed_weights_are_gone_and_the_rest_is_untouched(branch: str) -> None:
    model = tiny_model()
    pruned = apply_plan(model, plan_removing(model, {1: branch}))
    gone = set(model.state_dict()) - set(pruned.state_dict())
    assert gone and all(f"layers.1.mixers.{branch}." in n or f"alignment.inputs.{branch}." in n for n in gone)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    saved = sum(p.numel() * 4 for p in model.parameters()) - sum(p.numel() * 4 for p in pruned.parameters())
    assert saved == branch_savings(model)[1, branch].bytes > 0
    assert pruned.config.layers[1]["mixers"] == [other_branch(branch)]
    assert model.config.layers[1]["mixers"] == ["mamba", "attention"]


def test_nothing_is_shared_embeddings_stay_tied_and_marks_dtype_and_mode_stay() -> None:
    model = tiny_model().to(torch.bfloat16).train()
    model.get_parameter("model.layers.0.mixers.mamba.A_log").data = torch.zeros(4)
    random = torch.get_rng_state()
    pruned = apply_plan(model, plan_removing(model, {0: "attention"}))
    assert torch.equal(random, torch.get_rng_state())
    assert pruned.training
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    memory = {p.data_ptr() for p in model.parameters()}
    for name, parameter in pruned.named_parameters():
        original = model.get_parameter(name)
        assert parameter.data_ptr() not in memory
        assert parameter.dtype == original.dtype
        assert getattr(parameter, "_no_weight_decay", False) == getattr(original, "_no_weight_decay", False)


def test_a_pruned_model_can_be_pruned_again() -> None:
    model = tiny_model(num_hidden_layers=3)
    once = apply_plan(model, plan_removing(model, {0: "attention"}))
    twice = apply_plan(once, plan_removing(once, {2: "mamba"}))
    ids = torch.randint(0, 256, (1, 20))
    assert relative_error(model, twice, {0: "attention", 2: "mamba"}, ids) < 1e-5


def test_generation_of_the_cut_model_equals_that_of_the_masked_original() -> None:
    model = tiny_model()
    removed = {0: "mamba", 1: "attention"}
    pruned = apply_plan(model, plan_removing(model, removed))
    ids = torch.randint(0, 256, (1, 11))
    with model.branches_removed(removed):
        wanted = model.generate(ids, max_new_tokens=15, do_sample=False)
    assert torch.equal(pruned.generate(ids, max_new_tokens=15, do_sample=False), wanted)
