"""From plan to smaller model: a new model whose removed branches do not exist."""

from collections.abc import Mapping

import torch

from fusiontree.deploy.plan import Branch, PrunePlan, removals
from fusiontree.deploy.savings import cut_config
from fusiontree.models.hybrid_model import HybridLanguageModel


def apply_plan(model: HybridLanguageModel, plan: PrunePlan) -> HybridLanguageModel:
    """A new model without the branches the plan takes out; `model` is left as it is and shares no memory with it."""
    return cut_branches(model, removals(plan, model))


def cut_branches(model: HybridLanguageModel, removed: Mapping[int, Branch]) -> HybridLanguageModel:
    """A new model without these branches (layer → branch), each of which has a neighbour; `model` stays as it is."""
    config = cut_config(model.config, dict(removed))
    with torch.random.fork_rng(devices=[]):  # the drawn weights are overwritten; the caller's seed must not move
        pruned = HybridLanguageModel(config)
    originals = dict(model.named_parameters())
    for name, parameter in pruned.named_parameters():
        # The same dtype and device as before: state-space parameters stay fp32.
        parameter.data = torch.empty_like(originals[name].data)
        parameter.requires_grad_(originals[name].requires_grad)
    weights = model.state_dict()
    pruned.to(model.device).load_state_dict({name: weights[name] for name in pruned.state_dict()})
    return pruned.train(model.training)
