"""Measured removal decides: non-additive effects, the budget, and going on after an interruption."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.deploy.greedy import choose, make_plan, trade_up
from fusiontree.deploy.measure import RemovalLoss, RemovalMeasurement, Removed, measure_removal
from fusiontree.deploy.plan import Branch, removals
from fusiontree.deploy.propose import GateObservation, propose_from_gates
from fusiontree.errors import PlanError
from tests.deploy.tiny import tiny_model

M, A = "mamba", "attention"
KEYS: list[tuple[int, Branch]] = [(layer, branch) for layer in range(3) for branch in ("mamba", "attention")]


class MadeUpLoss:
    """Loss of a set of removals: a cost each, and an extra cost for pairs that lean on each other."""

    def __init__(self, costs: dict[tuple[int, str], float], pairs: dict[frozenset[tuple[int, str]], float]) -> None:
        self.costs, self.pairs, self.asked = costs, pairs, []

    def __call__(self, removed: Removed) -> float:
        taken = set(removed.items())
        self.asked.append(taken)
        extra = sum(value for pair, value in self.pairs.items() if pair <= taken)
        return 4.0 + sum(self.costs.get(item, 9.0) for item in taken) + extra


def singles(loss: MadeUpLoss) -> RemovalMeasurement:
    return RemovalMeasurement(4.0, {key: loss({key[0]: key[1]}) - 4.0 for key in KEYS})


def test_removals_that_are_cheap_alone_but_dear_together_are_not_both_taken() -> None:
    loss = MadeUpLoss({(0, M): 0.01, (1, M): 0.02, (2, A): 0.03}, {frozenset({(0, M), (1, M)}): 1.0})
    choice = choose(loss, singles(loss), dict.fromkeys(KEYS, 1.0), 4.1)
    assert choice.removed == {0: M, 2: A}
    assert choice.joint_loss == pytest.approx(4.04)
    assert choice.joint_loss == loss(choice.removed)


def test_one_that_became_dearer_waits_for_a_cheaper_one() -> None:
    """0 then 1 would cost 0.01 + 0.02 + 0.05; taking 2 before 1 leaves the budget to it."""
    loss = MadeUpLoss({(0, M): 0.01, (1, M): 0.02, (2, A): 0.03}, {frozenset({(0, M), (1, M)}): 0.05})
    choice = choose(loss, singles(loss), dict.fromkeys(KEYS, 1.0), 4.08)
    assert list(choice.removed.items()) == [(0, M), (2, A)]
    assert choice.refused[1, M] == pytest.approx(4.11)


def test_a_pair_that_helps_each_other_fits_where_the_sum_would_not() -> None:
    loss = MadeUpLoss({(0, M): 0.04, (1, M): 0.05}, {frozenset({(0, M), (1, M)}): -0.04})
    assert choose(loss, singles(loss), dict.fromkeys(KEYS, 1.0), 4.06).removed == {0: M, 1: M}


def test_the_loss_is_weighed_against_what_is_saved() -> None:
    loss = MadeUpLoss({(0, M): 0.02, (1, M): 0.03}, {})
    weights = {**dict.fromkeys(KEYS, 1.0), (1, "mamba"): 10.0}
    assert choose(loss, singles(loss), weights, 4.035).removed == {1: M}
    assert choose(loss, singles(loss), dict.fromkeys(KEYS, 1.0), 4.035).removed == {0: M}


def test_of_two_branches_that_cost_nothing_the_larger_goes() -> None:
    """A noisy measurement that calls the loss a little better must not win over twenty times the saving."""
    loss = MadeUpLoss({(0, M): -0.001, (0, A): -0.002}, {})
    weights = {**dict.fromkeys(KEYS, 1.0), (0, "mamba"): 20.0}
    assert choose(loss, singles(loss), weights, 4.0).removed == {0: M}


def test_what_is_left_of_the_budget_buys_larger_savings() -> None:
    """Attention is cheaper per byte, but the budget also allows Mamba, which saves more; not in both layers."""
    loss = MadeUpLoss({(0, A): 0.01, (0, M): 0.04, (1, A): 0.01, (1, M): 0.06}, {})
    weights = {(layer, branch): 3.0 if branch == "mamba" else 1.0 for layer, branch in KEYS}
    weights[1, "mamba"] = 4.0
    choice = choose(loss, singles(loss), weights, 4.065)
    assert choice.removed == {0: A, 1: A}
    trade_up(loss, choice, weights, 4.065)
    assert choice.removed == {0: M, 1: A}
    assert choice.joint_loss == loss(choice.removed) == pytest.approx(4.05)
    assert choice.loss_after[0] == choice.joint_loss and choice.others[0] == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_holds_and_one_branch_stays_whatever_the_effects(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float, shift: float) -> float:
        return float(torch.randn((), generator=generator)) * scale + shift

    costs = {key: draw(0.03, 0.02) for key in KEYS}
    pairs = {frozenset(pair): draw(0.03, 0.0) for pair in itertools.combinations(KEYS, 2)}
    loss = MadeUpLoss(costs, pairs)
    choice = choose(loss, singles(loss), dict.fromkeys(KEYS, 1.0), 4.05)
    trade_up(loss, choice, {key: 2.0 if key[1] == "mamba" else 1.0 for key in KEYS}, 4.05)
    assert choice.joint_loss <= 4.05
    assert choice.joint_loss == pytest.approx(loss(choice.removed))
    for layer in set(range(3)) - set(choice.removed):
        assert {(layer, "mamba"), (layer, "attention")} <= set(choice.refused)


def text_loss(model: Any) -> float:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))
    return float(model(ids, labels=ids, use_cache=False).loss)


def test_measured_removal_masks_one_branch_at_a_time_and_restores_the_model() -> None:
    model = tiny_model().train()
    measured = measure_removal(model, text_loss)
    assert model.training and model.removed_branches == {}
    model.eval()
    with torch.no_grad():
        assert measured.baseline_loss == text_loss(model)
        for (layer, branch), increase in measured.increases.items():
            with model.branches_removed({layer: branch}):
                assert increase == text_loss(model) - measured.baseline_loss
    assert len(measured.increases) == 4


def test_the_plan_tells_what_was_measured_and_its_prediction_is_the_joint_loss() -> None:
    model = tiny_model()
    gates = propose_from_gates(model, GateObservation({0: 0.9, 1: 0.5}, 100))
    plan = make_plan(model, text_loss, max_loss_increase=100.0, proposal=gates)
    removed = removals(plan, model)
    assert set(removed) == {0, 1}
    with torch.no_grad(), model.branches_removed(dict(removed)):
        assert plan.predicted_loss == text_loss(model)
    assert plan.budget.max_loss_increase == 100.0
    for entry in plan.layers:
        assert set(entry.loss_increase) == {"mamba", "attention"}
        assert entry.bytes_saved > 0 and entry.flops_saved_per_token > 0
        assert "measured" in entry.why and "the gates (mean" in entry.why


def test_without_budget_nothing_that_costs_is_taken_out() -> None:
    model = tiny_model()
    plan = make_plan(model, text_loss, max_loss_increase=0.0)
    assert plan.predicted_loss <= plan.baseline_loss
    for entry in plan.layers:
        if entry.keep == "both":
            assert "over the budget" in entry.why and entry.bytes_saved == 0


def test_a_layer_with_one_branch_is_left_alone() -> None:
    model = tiny_model(layers=[{"mixers": ["attention"]}, {}])
    plan = make_plan(model, text_loss, max_loss_increase=100.0)
    assert plan.layers[0].keep == "attention"
    assert set(removals(plan, model)) == {1}


@pytest.mark.parametrize("budget", [-0.1, float("nan"), float("inf")])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(PlanError, match="max_loss_increase"):
        make_plan(tiny_model(), text_loss, max_loss_increase=budget)


def test_a_loss_that_is_not_finite_stops_with_the_place() -> None:
    with pytest.raises(PlanError, match="without any removal is nan"):
        measure_removal(tiny_model(), lambda model: float("nan"))


def failing_after(count: int) -> Iterator[None]:
    yield from itertools.repeat(None, count)
    raise KeyboardInterrupt


def test_interrupted_it_goes_on_where_it_was(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "losses.jsonl"
    whole = make_plan(model, text_loss, max_loss_increase=0.5)
    left = failing_after(3)

    def interrupted(m: Any) -> float:
        next(left)
        return text_loss(m)

    with pytest.raises(KeyboardInterrupt, match=r"3 measurements are kept .* start again"):
        make_plan(model, interrupted, max_loss_increase=0.5, partial_path=path)
    with path.open("a") as file:
        file.write('{"removed": {"1": "mam')  # killed while writing
    calls = []

    def counted(m: Any) -> float:
        calls.append(1)
        return text_loss(m)

    assert make_plan(model, counted, max_loss_increase=0.5, partial_path=path) == whole
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 1 + 3 + len(calls)
    calls.clear()
    assert make_plan(model, counted, max_loss_increase=0.5, partial_path=path) == whole
    assert calls == []


def test_measurements_of_other_text_or_another_model_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    RemovalLoss(tiny_model(), text_loss, path, evaluation_id="text A")({})
    for model, text in ((tiny_model(), "text B"), (tiny_model(seed=1), "text A")):
        with pytest.raises(PlanError, match="another model or other text"):
            RemovalLoss(model, text_loss, path, evaluation_id=text)
    path.write_text(path.read_text() + '{"removed": 3}\n')
    with pytest.raises(PlanError, match="not a record"):
        RemovalLoss(tiny_model(), text_loss, path, evaluation_id="text A")
