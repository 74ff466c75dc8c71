"""V3 and V4: where the branches see each other, and how many gates there are."""

from pathlib import Path

import pytest
import torch

from fusiontree.deploy import observe_gates
from fusiontree.deploy.apply import apply_plan
from fusiontree.deploy.plan import LayerPlan, PrunePlan, identity_of, other_branch
from fusiontree.deploy.savings import branch_savings
from fusiontree.models import HybridConfig, HybridLanguageModel, account
from fusiontree.train.config import GateMonitorSection, LossSection
from fusiontree.train.gate_monitor import GateMonitor
from fusiontree.train.jsonl import JsonLines
from fusiontree.train.losses import HybridModelLoss
from tests.models.kinds import BASE, GRANULARITIES, assert_same, build, config_of, shared_model, tokens


def test_cross_fusion_starts_as_the_layer_without() -> None:
    model = HybridLanguageModel(config_of("cross"))
    plain = HybridLanguageModel(config_of("post"))
    rest = {name: t for name, t in model.state_dict().items() if ".cross." not in name}
    plain.load_state_dict(rest)
    ids = tokens(2, 30)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    downs = [p for name, p in model.named_parameters() if name.endswith("down.weight") and ".cross." in name]
    assert len(downs) == 4 and all(p.std().item() == pytest.approx(32**-0.5, rel=0.3) for p in downs)
    model(ids, labels=ids).loss.backward()
    assert all(b.cross.to_mamba.up.weight.grad.abs().max() > 0 for b in model.model.layers)


def test_the_glance_is_what_the_formula_says() -> None:
    block = shared_model("cross").model.layers[0]
    mamba, attention = torch.randn(2, 2, 9, 32)
    seen = block.cross({"mamba": mamba, "attention": attention})
    to_mamba, to_attention = block.cross.to_mamba, block.cross.to_attention
    assert_same(seen["mamba"], mamba + attention @ (to_mamba.up.weight @ to_mamba.down.weight).T)
    assert_same(seen["attention"], attention + mamba @ (to_attention.up.weight @ to_attention.down.weight).T)


def test_branch_norms_are_those_before_the_glance() -> None:
    model = build("cross")
    first = model(tokens(2, 30), output_gates=True).branch_rms[0]
    with torch.no_grad():
        for parameter in model.model.layers[0].cross.parameters():
            parameter.mul_(10)
    assert torch.equal(model(tokens(2, 30), output_gates=True).branch_rms[0], first)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gate_serves_its_group_of_channels(granularity: str) -> None:
    model = build("post", gate_granularity=granularity)
    gate = model(tokens(2, 30), output_gates=True).gates[0]
    assert gate.shape == (2, 30, 32)
    for size in (8, 32):  # a head's channels, a token's
        same = all((part == part[..., :1]).all() for part in gate.split(size, dim=-1))
        assert same == ((granularity, size) in {("head", 8), ("token", 8), ("token", 32), ("layer", 8), ("layer", 32)})
    assert (gate == gate[0, 0, 0]).all() == (granularity == "layer")
    gate.mean().backward()
    moved = [name for name, p in model.model.layers[0].gate.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved == (["logit"] if granularity == "layer" else ["U.weight", "D.weight"])


def test_fewer_gates_are_fewer_parameters() -> None:
    def gates(granularity: str) -> int:
        return account(HybridConfig(**{**BASE, "gate_granularity": granularity})).parameters["gate"]

    assert [gates(name) for name in GRANULARITIES] == [2 * 4 * (32 + n) for n in (32, 4, 1)] + [2]


def test_the_gate_of_a_layer_starts_undecided_and_is_never_decayed() -> None:
    model = HybridLanguageModel(config_of("gate_layer"))
    assert (model(tokens(1, 9), output_gates=True).gates[0] == 0.5).all()
    assert all(block.gate.logit._no_weight_decay for block in model.model.layers)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_whoever_reads_gates_reads_all_granularities(granularity: str, tmp_path: Path) -> None:
    model, ids = build("post", gate_granularity=granularity).train(), tokens(2, 30)
    out = model(ids, labels=ids, output_gates=True)
    settings = LossSection(balance_weight=1.0, balance_target=0.9, entropy_weight=1.0)
    terms = HybridModelLoss(settings, distill=False)(out, {"labels": ids}, "balance")
    terms["loss"].backward()
    means = [gate.mean().item() for gate in out.gates]
    assert terms["gate_mean"].item() == pytest.approx(sum(means) / 2, abs=1e-6)
    monitor = GateMonitor(GateMonitorSection(sample_tokens=60), 10, JsonLines(tmp_path / "gates.jsonl"))
    monitor.on_forward(50, {"input_ids": ids}, out)
    assert monitor.statistics is not None
    assert [row["mean"] for row in monitor.statistics.rows()] == pytest.approx(means, abs=1e-4)
    seen = observe_gates(model, [{"input_ids": ids}]).means
    assert [seen[0], seen[1]] == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("branch", ["mamba", "attention"])
def test_a_plan_takes_the_glances_out_too(branch: str) -> None:
    model = build("cross", gate_granularity="head")
    layers = [LayerPlan(layer=1, keep=other_branch(branch))]
    pruned = apply_plan(model, PrunePlan(model=identity_of(model), layers=layers))
    with torch.no_grad(), model.branches_removed({1: branch}):
        assert_same(pruned(tokens(2, 30)).logits, model(tokens(2, 30)).logits)
    gone = model.state_dict().keys() - pruned.state_dict().keys()
    assert any("layers.1.cross." in name for name in gone) and not any("layers.0." in name for name in gone)
    saved = 4 * (model.num_parameters() - pruned.num_parameters())
    assert branch_savings(model)[1, branch].bytes == saved
