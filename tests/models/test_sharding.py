"""Engines that shard parameters bring them together for one module's forward at a time: nothing may read them outside.

Here they are NaN at all other times.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fusiontree.models import HybridLanguageModel
from fusiontree.models.block import Block
from tests.models.kinds import KINDS, assert_same, build, tokens

PACKED = torch.cat([torch.arange(n) for n in (20, 1, 12)])[None]


@contextmanager
def gathered_within(groups: list[tuple[nn.Module, list[nn.Parameter]]]) -> Iterator[None]:
    """Each group's parameters have their values only while its module's forward runs."""
    real = {p: p.data for _, parameters in groups for p in parameters}
    away = {p: torch.full_like(p.data, torch.nan) for p in real}
    inside = dict.fromkeys(real, 0)

    def move(parameters: list[nn.Parameter], by: int) -> None:
        for p in parameters:
            inside[p] += by
            p.data = real[p] if inside[p] else away[p]

    hooks = []
    for module, parameters in groups:
        hooks.append(module.register_forward_pre_hook(lambda _, __, own=parameters: move(own, 1)))
        hooks.append(module.register_forward_hook(lambda _, __, ___, own=parameters: move(own, -1)))
        move(parameters, 0)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, values in real.items():
            p.data = values


def by_module(model: HybridLanguageModel) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """As DeepSpeed ZeRO-3: every module for itself."""
    owned = [(module, list(module.parameters(recurse=False))) for module in model.modules()]
    return [(module, parameters) for module, parameters in owned if parameters]


def by_block(model: HybridLanguageModel) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """As FSDP2 on every block and on the model, which keeps what no block has."""
    groups = [(block, list(block.parameters())) for block in model.modules() if isinstance(block, Block)]
    inner = {p for _, parameters in groups for p in parameters}
    return [*groups, (model, [p for p in model.parameters() if p not in inner])]


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_parameters_in_their_own_modules_only(kind: str) -> None:
    model, ids = build(kind).train(), tokens(2, 33)
    for what in ("none", "branches", "block"):
        model.model.gradient_checkpointing = what != "none"
        model.config.checkpointing = "branches" if what == "none" else what
        for extra in ({"skip_logits": True}, {"position_ids": PACKED, "output_gates": True}):
            want = model(ids, labels=ids, **extra).loss
            for groups in (by_module(model), by_block(model)):
                with gathered_within(groups):
                    got = model(ids, labels=ids, **extra).loss
                assert_same(got, want, 1e-6)


def test_generation_reads_parameters_in_their_own_blocks_only() -> None:
    model, ids = build("mixed"), tokens(2, 9)
    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with gathered_within(by_block(model)):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), want)


def test_values_outside_are_really_away() -> None:
    model = build("post")
    with gathered_within(by_module(model)), torch.no_grad():
        assert model.lm_head.weight.isnan().all() and not model(tokens(1, 5)).logits.isnan().any()
        block = model.model.layers[0]
        assert torch.nn.functional.linear(torch.ones(1, 32), block.fusion_proj.weight).isnan().all()
    assert not model.lm_head.weight.isnan().any()
